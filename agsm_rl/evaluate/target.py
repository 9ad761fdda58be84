"""The target of `sample` and `eval`: a run folder, an exported adapter, or a base."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, ValidationError

from agsm_rl.adapters.tensor_files import read_safetensors
from agsm_rl.backbones.checkpoint_names import ALLOWED, is_single_file
from agsm_rl.errors import UserError
from agsm_rl.export.attach import BASE_OPTIONS, Handle, attach_to_backbone, find_exports, read_export
from agsm_rl.files import check_contained, local_or_hub, local_path, parse_json
from agsm_rl.interfaces import Backbone, Bank
from agsm_rl.policy import check_bank, using
from agsm_rl.recipe.build import build_backbone
from agsm_rl.recipe.earlier import with_first_defaults
from agsm_rl.recipe.options import Section, explain
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.places import REPLACING
from agsm_rl.recipe.schema import Block, Samples
from agsm_rl.recipe.yaml_file import read_yaml
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt, guidance_form, guiding

CheckBase = Callable[[Mapping[str, Any]], None]
BUILTIN_DRAWING = (3.0, 20)
"""Guidance and steps for the small bases, unless a recipe says otherwise."""


def _first(value: Any) -> Any:
    """The first of several guidances."""
    return value[0] if isinstance(value, list) and value else value


class _Sample(Section):
    model_config = ConfigDict(extra="ignore")

    guidance: Annotated[float, BeforeValidator(_first)] = Samples().guidance[0]
    num_steps: int = Samples().num_steps


class _DrawingKeys(Section):
    """The keys of a run's recipe that drawing needs; the others may name parts of another version, or not installed."""

    model_config = ConfigDict(extra="ignore")

    backbone: Block
    sample: _Sample | None = None


@dataclass
class Target:
    """A backbone, with adapters attached unless the target is a base.

    Attributes:
        name: The target as the user gave it.
        block: The backbone's options.
        files: The adapters' files.
    """

    backbone: Backbone
    handle: Handle | None
    guidance: float
    num_steps: int
    name: str = ""
    block: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @contextmanager
    def using(
        self,
        bank: Bank = "positive",
        guidance_bank: GuidanceBank | None = None,
        guidance_prompt: GuidancePrompt | None = None,
    ) -> Iterator[None]:
        """Draw with this bank, and guide in this form (None: as the adapters say), within the block.

        UserError for the negative bank where there is none, and for a form that cannot be.
        """
        adapters = list(self.handle.adapters.values()) if self.handle else []
        check_bank(bank, adapters, where="--bank")
        if bank == "negative" and (guidance_bank or guidance_prompt):
            raise UserError(
                "--bank negative: draws both branches of guidance with the negative bank; leave it out to choose the "
                "unconditional branch alone by --guidance-bank and --guidance-prompt."
            )
        with using(adapters, bank), guiding(adapters, guidance_bank, guidance_prompt, where="--"):
            yield

    def guidance_form(self) -> dict[str, str]:
        """How guidance's unconditional branch is predicted now."""
        bank, prompt = guidance_form(list(self.handle.adapters.values()) if self.handle else [])
        return {"guidance_bank": bank, "guidance_prompt": prompt}


def open_target(
    target: str,
    *,
    base: str | None = None,
    options: Mapping[str, Any] | None = None,
    allow_imports: Collection[str] = (),
    check_base: CheckBase = lambda backbone: None,
) -> Target:
    """Load a run folder, an adapter file or folder, or a base.

    Args:
        target: The folder, file or name.
        base: The base to use instead of the one that the target names; needed for a LoRA that diffusers or PEFT wrote.
        options: Options of the backbone (dtype, device, …), which take precedence over the run's.
        allow_imports: Modules whose code the target may name (registry.permissions).
        check_base: Called with the backbone's options before anything is loaded; may raise a UserError.
    """
    path, more = local_path(target), dict(options or {})
    if (path / "recipe.yaml").is_file():
        return _open_run(path, base, more, allow_imports, check_base)
    is_adapter = path.suffix == ".safetensors" and not is_single_file(path)
    if is_adapter or (path.is_dir() and not (path / "model_index.json").is_file()):
        return _open_adapter(path, base, more, allow_imports, check_base)
    if base is not None:
        raise UserError(
            f"--base {base}: '{target}' is a base itself; --base goes with a run folder or an exported adapter."
        )
    if not target.startswith("builtin:"):
        local_or_hub(target, where="TARGET", allowed=f"a run folder, an exported adapter, or a base: {ALLOWED}")
    return _load({"use": "auto", "checkpoint": target} | more, where=target, check_base=check_base)


def _open_run(
    path: Path, base: str | None, more: dict[str, Any], allow_imports: Collection[str], check_base: CheckBase
) -> Target:
    check_contained(path, [name for name in ("recipe.yaml", "adapter") if os.path.lexists(path / name)])
    recipe, where = read_yaml(path / "recipe.yaml"), str(path / "recipe.yaml")
    try:
        backbone = {key: value for key, value in with_first_defaults(recipe).items() if key == "backbone"}
        given = _DrawingKeys.model_validate(recipe | backbone)
    except ValidationError as error:
        raise explain(error, where=f"{where}: ") from error
    block = given.backbone.model_dump()
    if base is not None:  # what changes the run's own base is not the other's
        block = {key: value for key, value in block.items() if key not in REPLACING} | {"checkpoint": base}
    block.pop("compile", None)  # compiling pays off in a training, not for a few pictures
    block.pop("attention", None)  # this machine may not have the kernel of the one that trained
    target = _load(
        block | more, where=where, name=str(path), adapter=path, allow_imports=allow_imports, check_base=check_base
    )
    if given.sample is not None:
        target.guidance, target.num_steps = given.sample.guidance, given.sample.num_steps
    return target


def _open_adapter(
    path: Path, base: str | None, more: dict[str, Any], allow_imports: Collection[str], check_base: CheckBase
) -> Target:
    files = find_exports(path)
    if base and len(files) == 1 and _is_foreign(files[0]):
        block = {"use": "auto", "checkpoint": base, "lora": str(files[0])}
        return _load(block | more, where=str(path), check_base=check_base)
    if base is None and _is_foreign(files[0]):
        raise UserError(
            f"{files[0]}: was not exported by agsm-rl, so it does not say which base it is for. For a LoRA from "
            "elsewhere, add --base, set `backbone.lora`, or use pipe.load_lora_weights; convert published token files "
            "and kohya's LoRA with `agsm-rl convert`."
        )
    _, metadata = read_export(files[0])
    checkpoint = base or metadata.get("checkpoint")
    if not checkpoint:
        raise UserError(
            f"{files[0]}: does not say which base it is for; add --base (builtin:shapes-sd15, or a folder)."
        )
    block = {"use": metadata.get("backbone", "auto"), "checkpoint": checkpoint}
    if base is None:
        block |= _trained_on(metadata, files[0])
    return _load(block | more, where=str(path), adapter=path, allow_imports=allow_imports, check_base=check_base)


def _trained_on(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What else an export says about its base: another U-Net, a fused LoRA, its dtype."""
    try:
        options = parse_json(metadata.get("backbone_options", "{}"), where="JSON")
        return {key: options[key] for key in BASE_OPTIONS if options.get(key) is not None}
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its metadata 'backbone_options' is broken ({error}); add --base.") from error


def _is_foreign(file: Path) -> bool:
    """True for a LoRA written by another tool, without our metadata."""
    return "kind" not in read_safetensors(file)[1]


def _load(
    block: dict[str, Any],
    *,
    where: str,
    name: str = "",
    adapter: Path | None = None,
    allow_imports: Collection[str] = (),
    check_base: CheckBase,
) -> Target:
    check_base(block)
    # Look for the exports first: loading a large base takes long.
    lora = Path(block.get("lora") or "")
    files = find_exports(adapter) if adapter is not None else [lora] if lora.is_file() else []
    parts = Parts(where=where, allow_imports=allow_imports)
    backbone = build_backbone(parts.complete("backbones", Block.model_validate(block), "backbone"), parts=parts)
    handle = None if adapter is None else attach_to_backbone(backbone, adapter, allow_imports=allow_imports)
    guidance, num_steps = BUILTIN_DRAWING if str(block["checkpoint"]).startswith("builtin:") else backbone.drawing
    return Target(backbone, handle, guidance, num_steps, name=name or where, block=block, files=tuple(files))
