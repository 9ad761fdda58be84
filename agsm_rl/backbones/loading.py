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

from agsm_rl.backbones import kinds
from agsm_rl.backbones.checkpoint_names import ALLOWED as ALLOWED
from agsm_rl.backbones.checkpoint_names import BUILTINS as BUILTINS
from agsm_rl.backbones.checkpoint_names import DENOISER
from agsm_rl.backbones.checkpoint_names import find_checkpoint as find_checkpoint
from agsm_rl.backbones.declaration import Declaration
from agsm_rl.backbones.empty_models import on_meta
from agsm_rl.backbones.fused_lora import fuse_lora, lora_in_folder, lora_of_hub
from agsm_rl.backbones.model_index import BadPart, check_index, check_object
from agsm_rl.backbones.parts import (
    check_complete,
    check_config,
    check_noise,
    check_single_file,
    check_tokenizers,
    load_parts,
    load_whole,
    only_variant,
)
from agsm_rl.backbones.quantization import Quantization, check_loadable
from agsm_rl.backbones.quantized_layers import stored_tensors
from agsm_rl.errors import UserError
from agsm_rl.files import cache_where_unreachable, hub_is_forbidden

_PASSED_ON = (UserError, MemoryError, torch.OutOfMemoryError)
"""Errors that say what is wrong already, or that have nothing to do with what a file holds."""


def find_kind(
    checkpoint: str, *, local_files_only: bool = False, revision: str | None = None, key: str = "backbone.checkpoint"
) -> str:
    """The name of a checkpoint's pipeline class; UserError, which names `key`, for one that no backbone loads."""
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
    if not kinds.is_loadable(kind):
        raise unsupported(where, kind)
    return kind


def unsupported(where: str, kind: str) -> UserError:
    """The error for a pipeline that no backbone supports."""
    missing = "".join(f"\nNot looked at: {mistake}" for mistake in kinds.import_from_packages())
    return UserError(f"{where} is a {kind}; supported: {', '.join(kinds.loadable())}.{missing}")


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
    quantization: Quantization | None = None,
    pipeline_class: str | None = None,
) -> Any:
    """Load the checkpoint's pipeline; UserError if that fails, or if no backbone is of its kind.

    denoisers: for `unet` or `transformer`, a folder or hub id to take it from. lora: one to be fused into the weights.
    config: for a single file, the pipeline folder or hub id that says how its parts are built. empty: on
    torch's meta device. The parts of a folder or hub id are then built from their configurations alone. revision: of
    the hub's files. key: what names the checkpoint, for messages. quantization: of the denoiser and the text encoders.
    pipeline_class: its name, where `find_kind` has told it already.

    If a folder's files are all of one variant, such as fp16, that one is read. A part whose files lack a weight, or
    hold a tensor that it has no place for, is refused (parts.py).
    """
    with cache_where_unreachable(checkpoint, *(denoisers or {}).values(), lora, config):
        name = pipeline_class or find_kind(checkpoint, local_files_only=local_files_only, revision=revision, key=key)
        return _load_pipeline(
            checkpoint, name, dtype, local_files_only, denoisers or {}, lora, config, empty, revision, key, quantization
        )


def _load_pipeline(
    checkpoint: str,
    name: str,
    dtype: torch.dtype,
    local_files_only: bool,
    denoisers: Mapping[str, str | None],
    lora: str | None,
    config: str | None,
    empty: bool,
    revision: str | None,
    key: str,
    quantization: Quantization | None,
) -> Any:
    kind = kinds.kind_of(name)
    assert kind is not None
    source, where = find_checkpoint(checkpoint, key), f"{key}: '{checkpoint}'"
    single = Path(source).is_file()
    if config is not None and not single:
        raise UserError("backbone.config: only a single-file checkpoint needs it; leave it out.")
    if quantization is not None:
        check_loadable(quantization, single_file=single, lora=lora)
    if single and config is None and local_files_only:
        raise _unconfigured(where, "diffusers would ask the hub for it, in spite of local_files_only")
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": local_files_only}
    parts = {
        part: _load_denoiser(part, given, kind, name, None if single else source, options, quantization, empty=empty)
        for part, given in denoisers.items()
        if given is not None
    }
    parts |= kind.without.get(name, {})
    pipeline_class = getattr(diffusers, name)
    try:
        if single:
            config = config and find_checkpoint(config, "backbone.config")
            if config is not None:
                check_index(DiffusionPipeline.load_config(config, local_files_only=local_files_only), replaced=parts)
            if config is not None:
                parts |= _text_encoders_beside(Path(source), config, where, options, kind.single_file_text)
            if config is not None:
                check_single_file(source, config, replaced=parts, local_only=local_files_only)
            pipeline = pipeline_class.from_single_file(source, config=config, **options, **parts)
            check_complete(pipeline)
            _use_prediction_type(pipeline, _tensor_names(Path(source), where))
        else:
            variant = only_variant(Path(source) / kind.part)
            whole = options | {"revision": revision}
            parts = load_parts(source, parts, whole, variant=variant, empty=empty, quantization=quantization)
            pipeline = pipeline_class.from_pretrained(source, use_safetensors=True, **whole, **parts)
        kind.autoencoder.check(pipeline.vae.config)
        check_noise(pipeline.scheduler)
        check_tokenizers(pipeline, ends_text=kind.ends_text)
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
        named = module.named_parameters() if isinstance(module, nn.Module) else ()
        for name, tensor in (stored for entry in named for stored in stored_tensors(*entry)):
            if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():  # float8 has none
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


def _kind_of_file(file: Path, where: str) -> str:
    if file.suffix != ".safetensors":
        raise UserError(f"{where}: only .safetensors are read as single files; a pickled file could run code.")
    names = _tensor_names(file, where)
    for marker, kind in kinds.single_file_markers().items():
        if any(name.removeprefix(DENOISER).startswith(marker) for name in names):
            return kind
    raise UserError(
        f"{where} is not a complete checkpoint in the original layout of a supported kind (its first tensor is "
        f"'{names[0] if names else ''}'). Give a denoiser alone as backbone.unet or backbone.transformer, a LoRA "
        "as backbone.lora."
    )


def _tensor_names(file: Path, where: str) -> list[str]:
    try:
        with safe_open(file, framework="pt") as content:
            return list(content.keys())
    except (OSError, SafetensorError) as error:
        raise _unloadable(where, error, str(file)) from error


def _text_encoders_beside(
    file: Path, config: str, where: str, options: dict[str, Any], prefixes: Mapping[str, str]
) -> dict[str, Any]:
    """The text encoders that a file leaves out, from its `config` pipeline, where diffusers does not look."""
    names = _tensor_names(file, where)
    missing = [part for part, prefix in prefixes.items() if not any(name.startswith(prefix) for name in names)]
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


def _load_denoiser(
    name: str,
    given: str,
    kind: type[Declaration],
    pipeline_class: str,
    base: str | None,
    options: dict[str, Any],
    quantization: Quantization | None,
    *,
    empty: bool = False,
) -> Any:
    """A U-Net or transformer from its own folder, or from that of a pipeline around it."""
    where = f"backbone.{name}: '{given}'"
    if name != kind.part:
        raise UserError(f"backbone.{name}: a {pipeline_class} has no {name}; give it as backbone.{kind.part}.")
    model, source = getattr(diffusers, kind.denoiser_class), find_checkpoint(given, f"backbone.{name}")
    only = options["local_files_only"]
    try:
        try:
            subfolder, config = None, model.load_config(source, local_files_only=only)
        except OSError:
            subfolder, config = name, model.load_config(source, subfolder=name, local_files_only=only)
        check_config(config, part=name)
        if empty:
            where_from = {"local_files_only": only}
            loaded = on_meta(model, source, subfolder, where_from, dtype=options["dtype"])
            if quantization is not None:
                quantization.empty(loaded)
        else:
            variant = only_variant(Path(source) / (subfolder or ""))
            loaded = load_whole(
                model, source, subfolder, part=name, variant=variant, options=options, quantization=quantization
            )
        expected = model.load_config(base, subfolder=name, local_files_only=only) if base else {}
    except _PASSED_ON:
        raise
    except BadPart as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # noqa: BLE001 - a stranger's files make the libraries fail in any way
        raise _unloadable(where, error, source, only) from error
    for key in kind.interface:
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
