"""What `sample` and `eval` are asked about: a run folder, an exported adapter, or a base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from agsm_rl.adapters.tensor_files import read_safetensors
from agsm_rl.backbones.loading import is_single_file
from agsm_rl.errors import UserError
from agsm_rl.export.attach import BASE_OPTIONS, Handle, attach, find_exports, read_export
from agsm_rl.files import local_path, parse_json
from agsm_rl.interfaces import Backbone, Bank
from agsm_rl.policy import check_bank, using
from agsm_rl.recipe.build import build_backbone
from agsm_rl.recipe.earlier import with_first_defaults
from agsm_rl.recipe.options import Section, explain
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import Block, Samples
from agsm_rl.recipe.yaml_file import read_yaml

BUILTIN_DRAWING = (3.0, 20)
"""Guidance and steps that suit the small bases, where nothing else is said."""


class _Sample(Section):
    model_config = ConfigDict(extra="ignore")

    guidance: float = Samples().guidance
    num_steps: int = Samples().num_steps


class _Drawn(Section):
    """What a run's recipe says of drawing with it; the rest may be of another version, or name parts not installed."""

    model_config = ConfigDict(extra="ignore")

    backbone: Block
    sample: _Sample | None = None


@dataclass
class Target:
    """A backbone, with adapters attached unless the target is a base."""

    backbone: Backbone
    handle: Handle | None
    guidance: float
    num_steps: int
    name: str = ""
    """As it was given."""
    block: Mapping[str, Any] = field(default_factory=dict)
    """The backbone's options."""
    files: tuple[Path, ...] = ()
    """Of its adapters."""

    def using(self, bank: Bank) -> AbstractContextManager[None]:
        """Draw with this bank within the block; UserError for the negative one where there is none."""
        adapters = list(self.handle.adapters.values()) if self.handle else []
        check_bank(bank, adapters, where="--bank")
        return using(adapters, bank)


def open_target(target: str, *, base: str | None = None, options: Mapping[str, Any] | None = None) -> Target:
    """Load a run folder, an adapter file or folder (`base` overrules the base that it names), or a base.

    A LoRA that is not of ours (as diffusers and PEFT write it) goes with a `base`. options: of the backbone, over the
    run's own (dtype, device, …).
    """
    path, more = local_path(target), dict(options or {})
    if (path / "recipe.yaml").is_file():
        return _open_run(path, base, more)
    is_adapter = path.suffix == ".safetensors" and not is_single_file(path)
    if is_adapter or (path.is_dir() and not (path / "model_index.json").is_file()):
        return _open_adapter(path, base, more)
    if base is not None:
        raise UserError(
            f"--base {base}: '{target}' is a base itself; --base goes with a run folder or an exported adapter."
        )
    return _opened({"use": "stable_diffusion", "checkpoint": target} | more, where=target)


def _open_run(path: Path, base: str | None, more: dict[str, Any]) -> Target:
    recipe, where = read_yaml(path / "recipe.yaml"), str(path / "recipe.yaml")
    try:
        given = _Drawn.model_validate(recipe | {"backbone": with_first_defaults(recipe)["backbone"]})
    except ValidationError as error:
        raise explain(error, where=f"{where}: ") from error
    block = given.backbone.model_dump() | ({"checkpoint": base} if base else {}) | more
    block.pop("compile", None)  # it pays over a training, not over a few pictures
    found = _opened(block, where=where, name=str(path), adapter=path)
    if given.sample is not None:
        found.guidance, found.num_steps = given.sample.guidance, given.sample.num_steps
    return found


def _open_adapter(path: Path, base: str | None, more: dict[str, Any]) -> Target:
    files = find_exports(path)
    if base and len(files) == 1 and _is_foreign(files[0]):
        return _opened({"use": "stable_diffusion", "checkpoint": base, "lora": str(files[0])} | more, where=str(path))
    _, metadata = read_export(files[0])
    checkpoint = base or metadata.get("checkpoint")
    if not checkpoint:
        raise UserError(
            f"{files[0]}: does not say which base it is for; add --base (builtin:shapes-sd15, or a folder)."
        )
    block = {"use": metadata.get("backbone", "stable_diffusion"), "checkpoint": checkpoint}
    if base is None:
        block |= _trained_on(metadata, files[0])
    return _opened(block | more, where=str(path), adapter=path)


def _trained_on(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What else an export says of its base: another U-Net in it, a fused LoRA, its dtype."""
    try:
        options = parse_json(metadata.get("backbone_options", "{}"), where="JSON")
        return {key: options[key] for key in BASE_OPTIONS if options.get(key) is not None}
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its metadata 'backbone_options' is broken ({error}); add --base.") from error


def _is_foreign(file: Path) -> bool:
    """True for a LoRA of another tool's, without our metadata."""
    return "kind" not in read_safetensors(file)[1]


def _opened(block: dict[str, Any], *, where: str, name: str = "", adapter: Path | None = None) -> Target:
    # Exports are looked for before the base is loaded, which takes long for a large one.
    lora = Path(block.get("lora") or "")
    files = find_exports(adapter) if adapter is not None else [lora] if lora.is_file() else []
    parts = Parts(where=where)
    backbone = build_backbone(parts.complete("backbones", Block.model_validate(block), "backbone"), parts=parts)
    handle = attach(backbone.pipeline, adapter) if adapter is not None else None
    guidance, num_steps = BUILTIN_DRAWING if str(block["checkpoint"]).startswith("builtin:") else backbone.drawing
    return Target(backbone, handle, guidance, num_steps, name=name or where, block=block, files=tuple(files))
