"""kohya's form, which ComfyUI and A1111 read: `lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`.

The form covers U-Nets and their CLIPs (`lora_te_…` in SD1.5; `lora_te1_…` and `lora_te2_…` in SDXL). It holds one set
of weights, the positive bank. `pipe.load_lora_weights` reads a plain LoRA in it too, but drops DoRA's lengths.
kohya_layers.py has the tensors of each kind of adapter.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor

from agsm_rl.adapters.lora_export import describe_adapter, export_configs, layers_of, name_in_file
from agsm_rl.adapters.lora_ranks import peft_scale, scales_of_export
from agsm_rl.adapters.peft_layers import MAGNITUDE
from agsm_rl.adapters.tensor_files import read_safetensors
from agsm_rl.errors import UserError
from agsm_rl.export.attach import write_export
from agsm_rl.export.kohya_layers import DOWN, UP, Layer, common_scale, lokr_options, read_layers, width, written
from agsm_rl.export.published import BACKBONES, BASE_OF_WIDTH

UNET = "lora_unet_"
PREFIXES = (UNET, "lora_te_", "lora_te1_", "lora_te2_")
PARTS = {"unet": UNET, "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
ALPHA = {"lora": "lora_alpha", "loha": "alpha", "lokr": "alpha"}
"""The kinds of adapter that the form holds, and PEFT's names of their alphas."""
A, B = ".lora_A.weight", ".lora_B.weight"
ORIGIN = ("base", "backbone", "backbone_options", "checkpoint", "objectives", "recipe_sha256", "step", "version")
"""Metadata keys that tell where an export comes from; the others belong to the form."""


def write_kohya(tensors: dict[str, Tensor], metadata: dict[str, str], out: Path) -> None:
    """Write the positive bank of an exported LoRA, LoHa or LoKr.

    UserError for other kinds, and for transformers, whose layers have no names in this form.
    """
    layers, kind = layers_of(tensors), metadata["kind"]
    if any(name.startswith("transformer.") for name in layers):
        raise UserError(
            "--to kohya: this form is for U-Nets only (SD1.5, SDXL). diffusers loads SD3's LoRA as exported; so does "
            "ComfyUI, except that it ignores alpha: set the strength to alpha / rank there"
        )
    scales = scales_of_export(export_configs(metadata), title=kind, kind=kind.upper(), alpha=ALPHA[kind])
    prefixes = PARTS | ({"text_encoder": "lora_te_"} if metadata.get("base") == "stable_diffusion" else {})
    converted = {}
    for name, roles in layers.items():
        part, _, module = name.partition(".")
        rank, alpha = scales[part].rank_of(module), scales[part].alpha_of(module)
        for role, tensor in written(kind, roles, rank, alpha).items():
            converted[f"{prefixes[part]}{module.replace('.', '_')}.{role}"] = tensor
    out.parent.mkdir(parents=True, exist_ok=True)
    write_export(out, converted, _origin(metadata))


def read_kohya(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a LoRA, LoHa or LoKr as tensors and metadata of our export.

    Layers may have diffusers' names or SDXL's original ones, and ranks and alphas of their own. UserError if the file
    is not such an adapter, or a tensor has no place.
    """
    tensors, metadata = read_safetensors(file)
    if "kind" in metadata:
        raise UserError(
            f"{file}: is already in agsm-rl's form, which attach() takes; other forms: agsm, softrepa, kohya, peft."
        )
    by_their_name = read_layers(tensors, PREFIXES, file)
    names = _our_names(by_their_name, file)
    layers = {names[name]: layer for name, layer in by_their_name.items()}
    kind = next(iter(layers.values())).kind
    options = lokr_options(layers, file) if kind == "lokr" else {}
    if any(MAGNITUDE in layer.tensors for layer in layers.values()):
        options["use_dora"] = True
    # Use whole names, not name endings: a file may cover some blocks only.
    targets: dict[str, dict[str, str]] = defaultdict(dict)
    for name in layers:
        part, _, module = name.partition(".")
        targets[part][module.removeprefix("text_model.")] = module
    scale = common_scale(layers)
    configs = {
        part: peft_scale(scale, part, modules, alpha=ALPHA[kind]) | {"target_modules": [*modules]} | options
        for part, modules in targets.items()
    }
    described = describe_adapter(kind, configs, banks=1, base=_base(layers))
    converted = {
        name_in_file(f"{name}.{role}"): tensor
        for name, layer in layers.items()
        for role, tensor in layer.tensors.items()
    }
    return converted, {**described, "name": kind, **_origin(metadata)}


def _base(layers: Mapping[str, Layer]) -> str:
    """The backbone whose text is as wide as the inputs of these layers; '' if none is."""
    widths = [width(layer) for name, layer in layers.items() if name.endswith("attn2.to_k")]
    return BACKBONES.get(BASE_OF_WIDTH.get(widths[0], ""), "") if widths else ""


def _our_names(layers: Iterable[str], file: Path) -> dict[str, str]:
    """Our names of a file's layers, by diffusers' rules: each goes through them with its number as its only weight."""
    theirs = list(layers)
    numbered = {
        f"{name}.{role}": torch.full((1, 1), float(number)) for number, name in enumerate(theirs) for role in (DOWN, UP)
    }
    try:
        # Original names number SDXL's layers consecutively; its U-Net has two per block.
        unet = SimpleNamespace(layers_per_block=2)
        renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(numbered, unet_config=unet)
    except (ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: has layers that diffusers cannot place in a U-Net ({error}).") from error
    converted = _to_peft_names(renamed)
    if odd := [name for name in converted if not name.endswith((A, B))]:
        raise UserError(f"{file}: has layers that diffusers cannot place ({', '.join(odd[:3])}).")
    names = {theirs[int(number)]: name.removesuffix(A) for name, number in converted.items() if name.endswith(A)}
    if lost := [name for name in theirs if name not in names]:
        raise UserError(
            f"{file}: diffusers cannot place {len(lost)} of its layers ({', '.join(lost[:3])}); nothing was converted."
        )
    return names


def _to_peft_names(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename layers of U-Net and text encoders from any of diffusers' conventions to PEFT's."""
    unet = {name: tensor for name, tensor in renamed.items() if name.startswith("unet.")}
    text = {name: tensor for name, tensor in renamed.items() if name not in unet}
    converted = dict(convert_unet_state_dict_to_peft(unet))
    if text:
        # diffusers would guess the type wrongly for files that lack some projections.
        text = convert_state_dict_to_diffusers(text, original_type=StateDictType.DIFFUSERS_OLD)
        converted |= convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS)
    return converted


def _origin(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: metadata[name] for name in ORIGIN if metadata.get(name)}
