"""Export adapters with `save_adapters`, and put them on plain diffusers pipelines with `attach(pipeline, path)`.

The files are ordinary safetensors whose metadata names the adapter's kind. `pipe.load_lora_weights` also takes that of
a LoRA. Pictures are drawn with the positive bank (arXiv 2605.30038), with guidance as the file says.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from agsm_rl import __version__
from agsm_rl.adapters.tensor_files import read_safetensors
from agsm_rl.backbones import backbone_of
from agsm_rl.backbones.quantized_layers import quantization_of
from agsm_rl.errors import UserError
from agsm_rl.export.exported_files import find_exports as find_exports
from agsm_rl.files import local_path, replacing
from agsm_rl.interfaces import Adapter, Backbone
from agsm_rl.registry import load
from agsm_rl.source_code import own_options
from agsm_rl.training.guidance import GuidanceBank, GuidanceHook, GuidancePrompt, Guides, branches_of, choose_form

logger = logging.getLogger(__name__)
BASE_OPTIONS = (
    *("unet", "transformer", "lora", "config", "resolution", "dtype", "scheduler", "quantize"),
    *own_options("backbones"),
)
"""Backbone options that, with its checkpoint, identify the base an adapter was trained on; exports record them. Those
that one kind of backbone has are among them."""
# `pipe.load_lora_weights(folder)` looks for this name.
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class Handle:
    """What `attach` did to a pipeline. `adapters` are named after their files, without the suffix."""

    adapters: dict[str, Adapter]
    _frozen: list[tuple[nn.Parameter, bool]]
    _modes: list[tuple[nn.Module, bool]]
    _guidance: GuidanceHook | None = None

    def __repr__(self) -> str:
        held = ", ".join(f"{name}: {adapter.kind}" for name, adapter in self.adapters.items())
        return f"<Handle of {held}>" if held else "<Handle, detached>"

    def detach(self) -> None:
        """Restore the pipeline bit for bit; a second call does nothing."""
        if self._guidance is not None:
            self._guidance.remove()
        for adapter in reversed(self.adapters.values()):
            adapter.detach()
        for parameter, flag in self._frozen:
            parameter.requires_grad_(flag)
        for module, training in self._modes:
            module.training = training
        self.adapters, self._frozen, self._modes = {}, [], []


def attach(
    pipeline: Any,
    path: str | os.PathLike[str],
    *,
    guidance_bank: GuidanceBank | None = None,
    guidance_prompt: GuidancePrompt | None = None,
) -> Handle:
    """Put exported adapters on a diffusers pipeline.

    Args:
        pipeline: The pipeline.
        path: A run folder (its `adapter/` is used), a folder of exported adapters, or one .safetensors file.
        guidance_bank: The bank of guidance's unconditional branch (training/guidance.py); by default the file's.
        guidance_prompt: The prompt of that branch; by default the file's.

    Raises UserError, and attaches nothing, if a file is missing, damaged, not one of ours or for another base, or if
    the pipeline's weights are offloaded layer by layer.
    """
    exports = {file.stem: read_export(file) for file in find_exports(Path(path))}
    handle = _unchanged(pipeline)
    with _detached_on_error(handle):
        backbone = backbone_of(pipeline)
        if pipeline.device.type == "meta":
            raise UserError(
                f"{path}: cannot be attached to a pipeline after enable_sequential_cpu_offload(), which leaves it "
                "without weights. Attach first, then offload; or use enable_model_cpu_offload()."
            )
        _add_exports(handle, backbone, exports, ())
        _guide(handle, pipeline, backbone, guidance_bank, guidance_prompt)
    return handle


def attach_to_backbone(
    backbone: Backbone, path: str | os.PathLike[str], *, allow_imports: Collection[str] = ()
) -> Handle:
    """`attach` for a loaded backbone, which may be of a class that is not registered (`allow_imports`).

    `evaluate.drawing.draw` applies guidance as the files say.
    """
    exports = {file.stem: read_export(file) for file in find_exports(Path(path))}
    handle = _unchanged(backbone.pipeline)
    with _detached_on_error(handle):
        _add_exports(handle, backbone, exports, allow_imports)
    return handle


def _unchanged(pipeline: Any) -> Handle:
    """A handle without adapters, which remembers the pipeline as it is."""
    modules = [module for module in pipeline.components.values() if isinstance(module, nn.Module)]
    return Handle(
        {},
        [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()],
        [(part, part.training) for module in modules for part in module.modules()],
    )


@contextmanager
def _detached_on_error(handle: Handle) -> Iterator[None]:
    try:
        yield
    except BaseException:
        handle.detach()
        raise


def _add_exports(
    handle: Handle,
    backbone: Backbone,
    exports: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]],
    allow_imports: Collection[str],
) -> None:
    for name, (tensors, metadata) in exports.items():
        adapter_class = load("adapters", metadata["kind"], where=f"{name}.safetensors", allow_imports=allow_imports)
        adapter = adapter_class.from_export(tensors, metadata)
        adapter.attach(backbone)
        handle.adapters[name] = adapter
        adapter.load_export(tensors, metadata)
        warn_of_another_base(backbone, metadata, where=f"{name}.safetensors")
        for _, parameter in adapter.named_parameters():
            parameter.requires_grad_(False)


def warn_of_another_base(backbone: Backbone, metadata: Mapping[str, str], *, where: str) -> None:
    """Log a warning if an adapter was trained on a base that is quantised in another way than this one."""
    try:
        options = json.loads(metadata["backbone_options"])
        trained = options.get("quantize")
    except (KeyError, ValueError, AttributeError):  # converted from elsewhere, or damaged: nothing is known
        return
    here = quantization_of(backbone.denoiser)
    if trained != here:
        logger.warning(
            "%s: was trained on a base %s, but this one is %s: it draws other pictures than in the run. Load the base "
            "%s.",
            where,
            f"quantised to {trained}" if trained else "that is not quantised",
            f"quantised to {here}" if here else "not quantised",
            f"with agsm_rl.backbones.quantization.pipeline_config('{trained}', …)" if trained else "unquantised",
        )


def _guide(
    handle: Handle, pipeline: Any, backbone: Backbone, bank: GuidanceBank | None, prompt: GuidancePrompt | None
) -> None:
    """Apply guidance as requested, or as the files say, until the handle is detached."""
    adapters = list(handle.adapters.values())
    choose_form(adapters, bank, prompt)
    if any(isinstance(adapter, Guides) for adapter in adapters):
        handle._guidance = GuidanceHook(pipeline, backbone.denoiser, adapters, branches_of(backbone))


def read_exports(path: str | os.PathLike[str]) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata of each adapter in a run folder or a folder of exported adapters, by name.

    UserError if two files hold adapters of one name.
    """
    exports: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}
    files: dict[str, Path] = {}
    for file in find_exports(Path(path)):
        tensors, metadata = read_export(file)
        name = metadata.get("name", file.stem)
        if name in exports:
            raise UserError(
                f"{path}: {files[name].name} and {file.name} are both an adapter named '{name}', of which one run can "
                "have one. Move one of the two files away."
            )
        exports[name], files[name] = (tensors, metadata), file
    return exports


def read_export(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an exported adapter; UserError if it is damaged or was not exported by agsm-rl."""
    tensors, metadata = read_safetensors(file)
    if "kind" not in metadata:
        raise UserError(
            f"{file}: was not exported by agsm-rl. Load a LoRA from elsewhere by pipe.load_lora_weights, or in a "
            "recipe by `backbone.lora`; convert published token files and kohya's LoRA with `agsm-rl convert`."
        )
    return tensors, metadata


def start_from(adapters: Mapping[str, Adapter], path: str | os.PathLike[str]) -> list[str]:
    """Fill attached adapters from the exported ones of the same name in a folder; return the names of those filled.

    Adapters without a namesake start fresh, such as soft tokens on top of a LoRA that another run trained, and exported
    adapters without a namesake are ignored. UserError if nothing is continued, if a name seems misspelt, or if an
    exported adapter is of another kind or shape, or for another base.
    """
    exports = read_exports(path)
    kinds = {name: metadata["kind"] for name, (_, metadata) in exports.items()}
    continued = names_continued({name: adapter.kind for name, adapter in adapters.items()}, kinds, where=str(path))
    for name in continued:
        tensors, metadata = exports[name]
        if metadata["kind"] != adapters[name].kind:
            raise UserError(
                f"{path}: its adapter '{name}' is a {metadata['kind']}, but here it is a {adapters[name].kind}"
            )
        adapters[name].load_export(tensors, metadata)
    return continued


def names_continued(adapters: Mapping[str, str], exported: Mapping[str, str], *, where: str) -> list[str]:
    """Which of a run's adapters continue from the exported ones in `where`; both are given as kind by name.

    UserError if none does, or if one would start fresh while an exported one of the same kind is dropped: then the name
    is probably misspelt, and the run would lose what it starts from.
    """
    continued = [name for name in adapters if name in exported]
    dropped = {kind: name for name, kind in exported.items() if name not in adapters}
    holds = ", ".join(f"{name} ({kind})" for name, kind in exported.items())
    for name, kind in adapters.items():
        if name not in exported and kind in dropped:
            raise UserError(
                f"{where}: holds no adapter '{name}'; it holds: {holds}. Name it '{dropped[kind]}', or keep both"
            )
    if not continued:
        raise UserError(
            f"{where}: none of its adapters is continued: it holds {holds}; the adapters here are "
            f"{', '.join(adapters)}. List those to keep under `adapters`, as they were trained; `trains` says which of "
            "them learn"
        )
    return continued


def save_adapters(
    adapters: Mapping[str, Adapter], folder: str | os.PathLike[str], *, metadata: Mapping[str, str]
) -> list[Path]:
    """Write each adapter to `<name>.safetensors` (a single LoRA to `pytorch_lora_weights.safetensors`).

    A LoRA's file under its other name, from an earlier save, is removed; files of other adapters stay.
    """
    target = local_path(folder)
    target.mkdir(parents=True, exist_ok=True)
    loras = [name for name, adapter in adapters.items() if adapter.kind == "lora"]
    files = []
    for name, adapter in adapters.items():
        file = target / (LORA_FILE if loras == [name] else f"{name}.safetensors")
        tensors, described = adapter.export()
        write_export(file, tensors, {**metadata, **described, "name": name})
        files.append(file)
    for file in {target / LORA_FILE, *(target / f"{name}.safetensors" for name in loras)} - {*files}:
        if _is_export_of(file, loras):
            file.unlink()
    return files


def _is_export_of(file: Path, names: Collection[str]) -> bool:
    try:
        return file.is_file() and read_safetensors(file)[1].get("name") in names
    except UserError:  # damaged: not ours to judge here, and whoever loads the folder is told
        return False


def write_export(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, metadata and our version; a kill leaves the old file or the new one. OSError if writing fails."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(file) as aside:
            save_file(contiguous, aside, {"version": __version__} | metadata)
    except SafetensorError as error:
        code = int(number[1]) if (number := re.search(r"os error (\d+)", str(error))) else errno.EIO
        raise OSError(code, os.strerror(code), str(file)) from error
