"""Finding and loading diffusers pipelines: a builtin base, a folder, a hub id or a single file; its kind is detected.

Weights are read from safetensors alone, because a pickled checkpoint could run code. The denoiser may be replaced and a
LoRA fused in, so that post-training begins at published weights (Diffusion-DPO's U-Net, SPO's, a style LoRA).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from agsm_rl.errors import UserError, unknown_name

BUILTINS = Path(__file__).parents[1] / "shapes" / "checkpoints"
KINDS = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
}
"""Pipelines that can be loaded, and the backbone of each."""
DENOISERS = {"unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel"}
# What a single file's tensors are called in each layout.
DENOISER = "model.diffusion_model."
SINGLE_FILES = {
    "joint_blocks.": "StableDiffusion3Pipeline",
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)")
SD3_TEXT = {
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
# Sizes that a denoiser must share with the one that it replaces.
INTERFACE = ("in_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim")
FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError, SingleFileComponentError)
# What `pipe.save_lora_weights` writes: the name that diffusers cannot ask the hub for while offline.
LORA_FILE = "pytorch_lora_weights.safetensors"


def find_checkpoint(checkpoint: str) -> str:
    """The folder of a `builtin:` name; anything else as it is. UserError for a builtin that does not exist."""
    if not checkpoint.startswith("builtin:"):
        return checkpoint
    name = checkpoint.removeprefix("builtin:")
    there = {path.parent.name for path in BUILTINS.glob("*/model_index.json")}
    if name not in there:
        raise unknown_name("backbone.checkpoint", checkpoint, "a builtin base", {f"builtin:{one}" for one in there})
    return str(BUILTINS / name)


def find_kind(checkpoint: str, *, local_files_only: bool = False) -> str:
    """The class of a checkpoint's pipeline, one of KINDS; UserError naming it when it is another."""
    source, where = find_checkpoint(checkpoint), f"backbone.checkpoint: '{checkpoint}'"
    if Path(source).is_file():
        return _kind_of_file(Path(source), where)
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise UserError(f"{where} is a folder without a model_index.json; give the folder of a diffusers pipeline.")
    try:
        kind = str(DiffusionPipeline.load_config(source, local_files_only=local_files_only).get("_class_name"))
    except FAILURES as error:
        raise _unloadable(where, error, source, local_files_only) from error
    if kind not in KINDS:
        raise unsupported(where, kind)
    return kind


def unsupported(where: str, kind: str) -> UserError:
    """The error for a pipeline that no backbone wraps."""
    return UserError(f"{where} is a {kind}; supported: {', '.join(KINDS)} (SD1.5, SDXL and SD3).")


def load_pipeline(
    checkpoint: str,
    *,
    dtype: torch.dtype,
    local_files_only: bool = False,
    denoisers: Mapping[str, str | None] | None = None,
    lora: str | None = None,
    config: str | None = None,
    empty: bool = False,
) -> Any:
    """The checkpoint's pipeline, of one of KINDS; UserError if it cannot be had.

    denoisers: for `unet` or `transformer`, a folder or hub id to take it from. lora: one to be fused into the weights.
    config: for a single file, the pipeline folder or hub id that says how its parts are built. empty: on
    torch's meta device. The parts of a folder or hub id are then built from their configurations alone.

    Of a folder whose files are all of one variant, such as fp16, these are read.
    """
    kind, source = find_kind(checkpoint, local_files_only=local_files_only), find_checkpoint(checkpoint)
    where = f"backbone.checkpoint: '{checkpoint}'"
    single = Path(source).is_file()
    if config is not None and not single:
        raise UserError("backbone.config: only a single-file checkpoint has use for it; leave it out.")
    if single and config is None and local_files_only:
        raise _unconfigured(where, "diffusers would ask the hub for it, in spite of local_files_only")
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": local_files_only}
    variant = _only_variant(Path(source) / _denoiser_of(kind))
    parts = {
        name: _load_denoiser(name, given, kind, None if single else source, options, empty=empty)
        for name, given in (denoisers or {}).items()
        if given is not None
    }
    if kind == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    found = getattr(diffusers, kind)
    try:
        if empty and not single:
            parts = _empty_parts(source, parts, options, variant)
        if single:
            config = config and find_checkpoint(config)
            if config is not None and kind == "StableDiffusion3Pipeline":
                parts |= _text_encoders_beside(Path(source), config, where, options)
            pipeline = found.from_single_file(source, config=config, **options, **parts)
        else:
            pipeline = found.from_pretrained(source, use_safetensors=True, variant=variant, **options, **parts)
    except FAILURES as error:
        if single and config is None and isinstance(error, OSError) and is_offline_mode():
            raise _unconfigured(where, "it is not in the hub's cache here, and HF_HUB_OFFLINE is set") from error
        raise _unloadable(where, error, source, local_files_only) from error
    pipeline.set_progress_bar_config(disable=True)
    if empty:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to("meta")
    if lora is not None and empty:
        _see_lora(lora)
    elif lora is not None:
        _fuse(pipeline, lora, local_files_only)
    return pipeline


def is_single_file(path: Path) -> bool:
    """Whether this is a readable .safetensors file that holds a pipeline in the original layout; by its names alone."""
    if not path.is_file():
        return False
    try:
        return any(name.startswith(DENOISER) for name in _tensor_names(path, str(path)))
    except UserError:
        return False


def _kind_of_file(file: Path, where: str) -> str:
    if file.suffix != ".safetensors":
        raise UserError(f"{where}: of single files only .safetensors are read; a pickled one could run code.")
    names = _tensor_names(file, where)
    for part, kind in SINGLE_FILES.items():
        if any(name.removeprefix(DENOISER).startswith(part) for name in names):
            return kind
    raise UserError(
        f"{where} is no whole SD1.5, SDXL or SD3 checkpoint in the original layout (its first tensor is "
        f"'{names[0] if names else ''}'). A denoiser alone goes into backbone.unet or backbone.transformer, a LoRA "
        "into backbone.lora."
    )


def _tensor_names(file: Path, where: str) -> list[str]:
    try:
        with safe_open(file, framework="pt") as content:
            return list(content.keys())
    except (OSError, SafetensorError) as error:
        raise _unloadable(where, error, str(file)) from error


def _text_encoders_beside(file: Path, config: str, where: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those that an SD3 file leaves out, from the pipeline of its configuration; diffusers looks there in vain."""
    names = _tensor_names(file, where)
    missing = [part for part, prefix in SD3_TEXT.items() if not any(name.startswith(prefix) for name in names)]
    if not missing:
        return {}
    classes = DiffusionPipeline.load_config(config, local_files_only=options["local_files_only"])
    return {
        part: getattr(transformers, classes[part][1]).from_pretrained(
            config, subfolder=part, use_safetensors=True, **options
        )
        for part in missing
        if classes[part][1] is not None
    }


def _empty_parts(source: str, given: dict[str, Any], options: dict[str, Any], variant: str | None) -> dict[str, Any]:
    """`given` and the models of a pipeline that it lacks, on the meta device: their configurations alone are read.

    Of a folder's weights it is seen that they are there and whole; OSError or SafetensorError if not.
    """
    only = options["local_files_only"]
    made = dict(given)
    for name, entry in DiffusionPipeline.load_config(source, local_files_only=only).items():
        if name in given or not isinstance(entry, list | tuple) or None in entry:
            continue
        library = {"diffusers": diffusers, "transformers": transformers}.get(entry[0])
        found: Any = getattr(library, entry[1], None)
        if nn.Module not in getattr(found, "__mro__", ()):
            continue
        if Path(source).is_dir():
            _see_weights(Path(source) / name, variant)
        if entry[0] == "diffusers":
            with torch.device("meta"):
                made[name] = found.from_config(found.load_config(source, subfolder=name, local_files_only=only))
        else:
            config = found.config_class.from_pretrained(source, subfolder=name, local_files_only=only)
            with torch.device("meta"):
                made[name] = found(config)
        made[name].to(options["dtype"])
    return made


def _denoiser_of(kind: str) -> str:
    """The denoiser's name in a pipeline of that kind."""
    return "transformer" if KINDS[kind] == "stable_diffusion_3" else "unet"


def _only_variant(folder: Path) -> str | None:
    """The variant of a folder's files, such as fp16 of `model.fp16.safetensors`, where it has those of no other."""
    found = {_variant_of(file) for file in folder.glob("*.safetensors")}
    return found.pop() if len(found) == 1 else None


def _variant_of(file: Path) -> str | None:
    """Of a part of several too: `model.fp16-00001-of-00002.safetensors`, or the other way round as it once was."""
    named = re.fullmatch(r"[^.]+\.([^.-]+)(-\d+-of-\d+)?\.safetensors", file.name)
    return named.group(1) if named else None


def _see_weights(folder: Path, variant: str | None) -> None:
    there = sorted(folder.glob("*.safetensors"))
    # Where a part has no files of the variant, diffusers takes its plain ones.
    files = [file for file in there if _variant_of(file) == variant] or [
        file for file in there if not _variant_of(file)
    ]
    if not files:
        raise FileNotFoundError(f"there are no .safetensors in {folder}{' but for variants' if there else ''}.")
    for file in files:
        with safe_open(file, framework="pt"):  # reads the header, which says how long the file must be
            pass
    for index in folder.glob("*.index*.json"):
        parts = {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        for part in sorted(parts):
            if _variant_of(part) == _variant_of(files[0]) and not part.is_file():
                raise FileNotFoundError(f"{part}, a part of {index.name}, is not there.")


def _load_denoiser(
    name: str, given: str, kind: str, base: str | None, options: dict[str, Any], *, empty: bool = False
) -> Any:
    """A U-Net or transformer from its own folder, or from that of a pipeline around it."""
    where = f"backbone.{name}: '{given}'"
    if name != _denoiser_of(kind):
        raise UserError(f"backbone.{name}: a {kind} has no {name}; give it as backbone.{_denoiser_of(kind)}.")
    model, source = getattr(diffusers, DENOISERS[name]), find_checkpoint(given)
    only = options["local_files_only"]
    try:
        try:
            subfolder, config = None, model.load_config(source, local_files_only=only)
        except OSError:
            subfolder, config = name, model.load_config(source, subfolder=name, local_files_only=only)
        if empty:
            with torch.device("meta"):
                loaded = model.from_config(config).to(options["dtype"])
        else:
            variant = _only_variant(Path(source) / (subfolder or ""))
            loaded = model.from_pretrained(
                source, subfolder=subfolder, variant=variant, use_safetensors=True, **options
            )
        expected = model.load_config(base, subfolder=name, local_files_only=only) if base else {}
    except FAILURES as error:
        raise _unloadable(where, error, source, only) from error
    for key in INTERFACE:
        if key in expected and config.get(key) != expected[key]:
            raise UserError(
                f"{where} has {key} {config.get(key)}, the checkpoint's own {name} {expected[key]}; it is for another "
                "base."
            )
    return loaded


def _fuse(pipeline: Any, lora: str, local_files_only: bool) -> None:
    """Add a LoRA's weights to the pipeline's own, and leave no trace of PEFT."""
    where = f"backbone.lora: '{lora}'"
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": local_files_only}
    if not Path(lora).exists():
        if not HUB_ID.fullmatch(lora):
            raise _unloadable(where, FileNotFoundError(), lora)
        if local_files_only or is_offline_mode():
            options["weight_name"] = LORA_FILE
    try:
        pipeline.load_lora_weights(lora, **options)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except (*FAILURES, RuntimeError, HTTPError) as error:
        raise _unloadable(where, error, lora, local_files_only) from error


def _see_lora(lora: str) -> None:
    """UserError where it is plain without loading it that a LoRA is not there, or is none."""
    where, path = f"backbone.lora: '{lora}'", Path(lora)
    if not path.exists():
        if HUB_ID.fullmatch(lora):
            return
        raise _unloadable(where, FileNotFoundError(), lora)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not any("lora" in name for file in files for name in _tensor_names(file, where)):
        raise _unloadable(where, ValueError("it holds no tensors of a LoRA."), lora)


def _unconfigured(where: str, cause: str) -> UserError:
    return UserError(
        f"{where} is a single file, which does not say how its parts are built: {cause}. Give `config:`, the folder of "
        "a diffusers pipeline of its kind (its weights are not needed)."
    )


def _is_of_the_net(error: BaseException | None) -> bool:
    """Whether it began with a hub that gave no answer, which diffusers tells as a file that is missing."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | HTTPError) and not isinstance(error, HfHubHTTPError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _unloadable(where: str, error: Exception, source: str, local_files_only: bool = False) -> UserError:
    """The error for what could not be loaded from `source`; said plainly where it is not there at all."""
    cause = str(error)
    if isinstance(error, SingleFileComponentError):
        cause = (
            f"{cause.splitlines()[0]} SD3 is also published without its text encoders; give `config:` the folder or "
            "hub id of a whole pipeline: they are then taken from there."
        )
    if isinstance(error, OSError | HTTPError) and not Path(source).exists():
        if not HUB_ID.fullmatch(source):
            cause = "there is no such file or folder."
        elif local_files_only or is_offline_mode():
            cause = (
                "it is not (or not whole) in the hub's cache here, and the hub may not be asked: local_files_only or "
                "HF_HUB_OFFLINE is set."
            )
        elif _is_of_the_net(error):
            cause = "it is not in the hub's cache here, and the hub cannot be reached."
    return UserError(
        f"{where} cannot be loaded: {cause}\nGive an existing folder, a .safetensors file, a hub id (owner/name), or "
        "a builtin base such as builtin:shapes-sd15."
    )
