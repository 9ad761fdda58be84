"""Finding and loading diffusers pipelines: a builtin base, a folder, a hub id or a single file; its kind is detected.

Weights are read from safetensors alone, because a pickled checkpoint could run code. The denoiser may be replaced and a
LoRA fused in, so that post-training begins at published weights (Diffusion-DPO's U-Net, SPO's, a style LoRA).
"""

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

from agsm_rl.backbones.fused_lora import fuse_lora, lora_in_folder, lora_of_hub
from agsm_rl.backbones.parts import (
    BadPart,
    check_complete,
    check_config,
    check_index,
    check_numbers,
    check_object,
    check_single_file,
    check_tokenizers,
    load_parts,
    load_whole,
    only_variant,
)
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.files import cache_where_unreachable, hub_is_forbidden, local_or_hub

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
SD3_TEXT = {
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
# Sizes that a denoiser must share with the one that it replaces.
INTERFACE = ("in_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim")
ALLOWED = "an existing folder, a .safetensors file, a hub id (owner/name), or a builtin such as builtin:shapes-sd15"
_PASSED_ON = (UserError, MemoryError, torch.OutOfMemoryError)
"""Errors that say what is wrong already, or that have nothing to do with what a file holds."""


def find_checkpoint(checkpoint: str, where: str = "backbone.checkpoint") -> str:
    """The folder of a `builtin:` name, a local path with `~` expanded, or a hub id; UserError for anything else.

    `where` is the key that names it.
    """
    if not checkpoint.startswith("builtin:"):
        path = local_or_hub(checkpoint, where=f"{where}:", allowed=ALLOWED)
        return checkpoint if path is None else str(path)
    name = checkpoint.removeprefix("builtin:")
    there = {path.parent.name for path in BUILTINS.glob("*/model_index.json")}
    if name not in there:
        raise unknown_name(where, checkpoint, "a builtin base", {f"builtin:{one}" for one in there})
    return str(BUILTINS / name)


def find_kind(
    checkpoint: str, *, local_files_only: bool = False, revision: str | None = None, key: str = "backbone.checkpoint"
) -> str:
    """The name of a checkpoint's pipeline class, one of KINDS; UserError, which names `key`, for any other class."""
    source, where = find_checkpoint(checkpoint, key), f"{key}: '{checkpoint}'"
    if Path(source).is_file():
        return _kind_of_file(Path(source), where)
    if Path(source).exists() and not Path(source).is_dir():
        raise UserError(f"{where} is not a regular file (a named pipe, a device or a socket); give {ALLOWED}.")
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise UserError(f"{where} is a folder without model_index.json; give the folder of a diffusers pipeline.")
    for path in Path(source).rglob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):  # opening a named pipe would block forever
            raise UserError(f"{where}: {path.relative_to(source)} is not a regular file; get another copy.")
    try:
        with cache_where_unreachable(source):
            index = DiffusionPipeline.load_config(source, local_files_only=local_files_only, revision=revision)
        check_object(index, "model_index.json")
        kind = str(index.get("_class_name"))
    except _PASSED_ON:
        raise
    except BadPart as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # noqa: BLE001 - a stranger's files make the libraries fail in any way
        raise _unloadable(where, error, source, local_files_only) from error
    if kind not in KINDS:
        raise unsupported(where, kind)
    return kind


def unsupported(where: str, kind: str) -> UserError:
    """The error for a pipeline that no backbone supports."""
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
    revision: str | None = None,
    key: str = "backbone.checkpoint",
) -> Any:
    """Load the checkpoint's pipeline, one of KINDS; UserError if that fails.

    denoisers: for `unet` or `transformer`, a folder or hub id to take it from. lora: one to be fused into the weights.
    config: for a single file, the pipeline folder or hub id that says how its parts are built. empty: on
    torch's meta device. The parts of a folder or hub id are then built from their configurations alone. revision: of
    the hub's files. key: what names the checkpoint, for messages.

    If a folder's files are all of one variant, such as fp16, that one is read. A part whose files lack a weight, or
    hold a tensor that it has no place for, is refused (parts.py).
    """
    with cache_where_unreachable(checkpoint, *(denoisers or {}).values(), lora, config):
        return _load_pipeline(checkpoint, dtype, local_files_only, denoisers or {}, lora, config, empty, revision, key)


def _load_pipeline(
    checkpoint: str,
    dtype: torch.dtype,
    local_files_only: bool,
    denoisers: Mapping[str, str | None],
    lora: str | None,
    config: str | None,
    empty: bool,
    revision: str | None,
    key: str,
) -> Any:
    kind = find_kind(checkpoint, local_files_only=local_files_only, revision=revision, key=key)
    source, where = find_checkpoint(checkpoint, key), f"{key}: '{checkpoint}'"
    single = Path(source).is_file()
    if config is not None and not single:
        raise UserError("backbone.config: only a single-file checkpoint needs it; leave it out.")
    if single and config is None and local_files_only:
        raise _unconfigured(where, "diffusers would ask the hub for it, in spite of local_files_only")
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": local_files_only}
    parts = {
        name: _load_denoiser(name, given, kind, None if single else source, options, empty=empty)
        for name, given in denoisers.items()
        if given is not None
    }
    if kind == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline_class = getattr(diffusers, kind)
    try:
        if single:
            config = config and find_checkpoint(config, "backbone.config")
            if config is not None:
                check_index(DiffusionPipeline.load_config(config, local_files_only=local_files_only), replaced=parts)
            if config is not None and kind == "StableDiffusion3Pipeline":
                parts |= _text_encoders_beside(Path(source), config, where, options)
            if config is not None:
                check_single_file(source, config, replaced=parts, local_only=local_files_only)
            pipeline = pipeline_class.from_single_file(source, config=config, **options, **parts)
            check_complete(pipeline)
            _use_prediction_type(pipeline, _tensor_names(Path(source), where))
        else:
            variant = only_variant(Path(source) / _denoiser_of(kind))
            whole = options | {"revision": revision}
            parts = load_parts(source, parts, whole, variant=variant, empty=empty)
            pipeline = pipeline_class.from_pretrained(source, use_safetensors=True, **whole, **parts)
        check_numbers(pipeline)
        check_tokenizers(pipeline)
    except _PASSED_ON:
        raise
    except BadPart as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # noqa: BLE001 - a stranger's files make the libraries fail in any way
        if single and config is None and isinstance(error, OSError) and hub_is_forbidden():
            raise _unconfigured(where, "it is not in the hub's cache here, and HF_HUB_OFFLINE is set") from error
        raise _unloadable(where, error, source, local_files_only) from error
    pipeline.set_progress_bar_config(disable=True)
    if empty:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to("meta")
    if lora is not None:
        _add_lora(pipeline, lora, local_files_only, empty=empty)
    return pipeline


def check_finite(pipeline: Any, where: str) -> None:
    """UserError naming the first weight that is not finite: all that is drawn would be noise."""
    for part, module in pipeline.components.items():
        for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
            if not torch.isfinite(parameter).all():
                raise UserError(
                    f"{where}: its {part} has weights that are not finite, first in "
                    f"'{name}'; download the file again, or use another one."
                )


def _use_prediction_type(pipeline: Any, names: list[str]) -> None:
    """Heed the marks of v-prediction checkpoints: a tensor called `v_pred`, and `ztsnr` for zero terminal SNR."""
    marks: dict[str, Any] = {}
    if "v_pred" in names:
        marks["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        marks |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if marks:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **marks)


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
        raise UserError(f"{where}: only .safetensors are read as single files; a pickled file could run code.")
    names = _tensor_names(file, where)
    for part, kind in SINGLE_FILES.items():
        if any(name.removeprefix(DENOISER).startswith(part) for name in names):
            return kind
    raise UserError(
        f"{where} is not a complete SD1.5, SDXL or SD3 checkpoint in the original layout (its first tensor is "
        f"'{names[0] if names else ''}'). Give a denoiser alone as backbone.unet or backbone.transformer, a LoRA "
        "as backbone.lora."
    )


def _tensor_names(file: Path, where: str) -> list[str]:
    try:
        with safe_open(file, framework="pt") as content:
            return list(content.keys())
    except (OSError, SafetensorError) as error:
        raise _unloadable(where, error, str(file)) from error


def _text_encoders_beside(file: Path, config: str, where: str, options: dict[str, Any]) -> dict[str, Any]:
    """The text encoders that an SD3 file leaves out, from its `config` pipeline, where diffusers does not look."""
    names = _tensor_names(file, where)
    missing = [part for part, prefix in SD3_TEXT.items() if not any(name.startswith(prefix) for name in names)]
    if not missing:
        return {}
    classes = DiffusionPipeline.load_config(config, local_files_only=options["local_files_only"])
    return {
        part: load_whole(
            getattr(transformers, classes[part][1]), config, part, part=part, variant=None, options=options
        )
        for part in missing
        if classes[part][1] is not None
    }


def _denoiser_of(kind: str) -> str:
    """The denoiser's name in a pipeline of that kind."""
    return "transformer" if KINDS[kind] == "stable_diffusion_3" else "unet"


def _load_denoiser(
    name: str, given: str, kind: str, base: str | None, options: dict[str, Any], *, empty: bool = False
) -> Any:
    """A U-Net or transformer from its own folder, or from that of a pipeline around it."""
    where = f"backbone.{name}: '{given}'"
    if name != _denoiser_of(kind):
        raise UserError(f"backbone.{name}: a {kind} has no {name}; give it as backbone.{_denoiser_of(kind)}.")
    model, source = getattr(diffusers, DENOISERS[name]), find_checkpoint(given, f"backbone.{name}")
    only = options["local_files_only"]
    try:
        try:
            subfolder, config = None, model.load_config(source, local_files_only=only)
        except OSError:
            subfolder, config = name, model.load_config(source, subfolder=name, local_files_only=only)
        check_config(config, part=name)
        if empty:
            with torch.device("meta"):
                loaded = model.from_config(config).to(options["dtype"])
        else:
            variant = only_variant(Path(source) / (subfolder or ""))
            loaded = load_whole(model, source, subfolder, part=name, variant=variant, options=options)
        expected = model.load_config(base, subfolder=name, local_files_only=only) if base else {}
    except _PASSED_ON:
        raise
    except BadPart as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # noqa: BLE001 - a stranger's files make the libraries fail in any way
        raise _unloadable(where, error, source, only) from error
    for key in INTERFACE:
        if key in expected and config.get(key) != expected[key]:
            raise UserError(
                f"{where} has {key} {config.get(key)}, the checkpoint's {name} {expected[key]}; it belongs to another "
                "base."
            )
    return loaded


def _add_lora(pipeline: Any, lora: str, local_files_only: bool, *, empty: bool) -> None:
    """Fuse a LoRA; where the pipeline is empty, it is only seen that it fits, and the hub is not asked for it."""
    where = f"backbone.lora: '{lora}' cannot be loaded"
    lora = find_checkpoint(lora, "backbone.lora")
    path = Path(lora)
    offline = local_files_only or is_offline_mode()
    try:
        if path.exists():
            file = lora_in_folder(path, where=where) if path.is_dir() else path
        else:
            file = lora_of_hub(lora, where=where, local_files_only=offline or empty)
        fuse_lora(pipeline, file, where=where)
    except _PASSED_ON:
        raise
    except Exception as error:  # noqa: BLE001 - the hub fails in many ways
        if empty and not offline and isinstance(error, LocalEntryNotFoundError):
            return
        raise _unloadable(f"backbone.lora: '{lora}'", error, lora, local_files_only) from error


def _unconfigured(where: str, cause: str) -> UserError:
    return UserError(
        f"{where} is a single file, which does not describe its parts: {cause}. Set `config:` to the folder of a "
        "diffusers pipeline of the same kind (its weights are not needed)."
    )


def _is_of_the_net(error: BaseException | None) -> bool:
    """Whether the cause is a hub that did not answer, which diffusers reports as a missing file."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | HTTPError) and not isinstance(error, HfHubHTTPError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _unloadable(where: str, error: Exception, source: str, local_files_only: bool = False) -> UserError:
    """The error for what could not be loaded from `source`, saying so plainly if it does not exist."""
    cause = str(error)
    if isinstance(error, SingleFileComponentError):
        cause = (
            f"{cause.splitlines()[0]} SD3 is also published without its text encoders; give `config:` the folder or "
            "hub id of a whole pipeline: they are then taken from there."
        )
    if isinstance(error, OSError | HTTPError) and not Path(source).exists():
        if local_files_only or hub_is_forbidden():
            cause = (
                "it is not (or not completely) in the hub's cache here, and the hub may not be asked: local_files_only "
                "or HF_HUB_OFFLINE is set."
            )
        elif _is_of_the_net(error) or is_offline_mode():
            cause = "it is not in the hub's cache here, and the hub cannot be reached."
    return UserError(f"{where} cannot be loaded: {cause}\nGive {ALLOWED}.")
