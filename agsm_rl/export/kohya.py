"""LoRA in kohya's form, which ComfyUI and A1111 read: `lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`.

The form covers U-Nets and their CLIPs (`lora_te_…` in SD1.5; `lora_te1_…` and `lora_te2_…` in SDXL). It holds one set
of weights, the positive bank. `pipe.load_lora_weights` reads it too.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.lora_config import check_alpha
from agsm_rl.adapters.lora_export import describe_lora
from agsm_rl.adapters.lora_files import NEGATIVE_PREFIX
from agsm_rl.adapters.tensor_files import read_safetensors
from agsm_rl.errors import UserError
from agsm_rl.export.attach import write_export
from agsm_rl.export.published import BACKBONES, BASE_OF_WIDTH

UNET = "lora_unet_"
PREFIXES = (UNET, "lora_te_", "lora_te1_", "lora_te2_")
DOWN, UP = "lora_down.weight", "lora_up.weight"
OURS = (".lora_A.weight", ".lora_B.weight")
ORIGIN = ("base", "backbone", "backbone_options", "checkpoint", "objectives", "recipe_sha256", "step", "version")
"""Metadata keys that tell where an export comes from; the others belong to the form."""


def write_kohya(tensors: dict[str, Tensor], metadata: dict[str, str], out: Path) -> None:
    """Write the positive bank of an exported LoRA; UserError for SD3, whose transformer has no names in this form."""
    positive = {name: tensor for name, tensor in tensors.items() if not name.startswith(NEGATIVE_PREFIX)}
    if any(name.startswith("transformer.") for name in positive):
        raise UserError(
            "--to kohya: this form is for U-Nets only (SD1.5, SDXL). diffusers loads SD3's LoRA as exported; so does "
            "ComfyUI, except that it ignores alpha: set the strength to alpha / rank there"
        )
    converted = convert_state_dict_to_kohya(positive)
    if metadata.get("base") == "stable_diffusion":  # a single text encoder has no number
        converted = {name.replace("lora_te1_", "lora_te_", 1): tensor for name, tensor in converted.items()}
    alpha = torch.tensor(float(LoRA.from_export(tensors, metadata).alpha))  # diffusers writes the rank
    converted = {name: alpha if name.endswith(".alpha") else tensor for name, tensor in converted.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    # safetensors requires separate memory for each tensor, including the alphas.
    write_export(out, {name: tensor.clone() for name, tensor in converted.items()}, _origin(metadata))


def read_kohya(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a LoRA as tensors and metadata of our export; layers may have diffusers' names or SDXL's original ones.

    UserError if the file is not such a LoRA, or its layers differ in rank or alpha.
    """
    tensors, metadata = read_safetensors(file)
    if "kind" in metadata:
        raise UserError(
            f"{file}: is already in agsm-rl's form, which attach() takes; other forms: agsm, softrepa, kohya."
        )
    rank, alpha = _rank_and_alpha(tensors, file)
    expected = sum(name.endswith((DOWN, UP)) for name in tensors)  # diffusers empties the dictionary
    try:
        # Original names number SDXL's layers consecutively; its U-Net has two per block.
        unet = SimpleNamespace(layers_per_block=2)
        renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=unet)
    except (ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: has layers that diffusers cannot place in a U-Net ({error}).") from error
    converted = _to_peft_names(renamed)
    if odd := [name for name in converted if not name.endswith(OURS)]:
        raise UserError(f"{file}: has layers that diffusers cannot place ({', '.join(odd[:3])}).")
    if lost := expected - len(converted):
        raise UserError(f"{file}: diffusers cannot place {lost} of its tensors; nothing was converted.")
    # Use whole names, not name endings: a file may cover some blocks only.
    targets: dict[str, list[str]] = defaultdict(list)
    for name in converted:
        if name.endswith(OURS[0]):
            part, _, layer = name.removesuffix(OURS[0]).partition(".")
            targets[part].append(layer.removeprefix("text_model."))
    widths = [converted[f"unet.{layer}{OURS[0]}"].shape[1] for layer in targets["unet"] if layer.endswith("attn2.to_k")]
    base = BACKBONES.get(BASE_OF_WIDTH.get(widths[0], ""), "") if widths else ""
    described = describe_lora(targets, rank=rank, alpha=alpha, banks=1, base=base)
    return converted, {**described, "name": "lora", **_origin(metadata)}


def _to_peft_names(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename layers of U-Net and text encoders from any of diffusers' conventions to PEFT's."""
    unet = {name: tensor for name, tensor in renamed.items() if name.startswith("unet.")}
    text = {name: tensor for name, tensor in renamed.items() if name not in unet}
    converted = convert_unet_state_dict_to_peft(unet)
    if text:
        # diffusers would guess the type wrongly for files that lack some projections.
        text = convert_state_dict_to_diffusers(text, original_type=StateDictType.DIFFUSERS_OLD)
        converted |= convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS)
    return {name: tensor.float() for name, tensor in converted.items()}


def _rank_and_alpha(tensors: dict[str, Tensor], file: Path) -> tuple[int, float]:
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        layers[layer][part] = tensor
    odd = [n for n, parts in layers.items() if not n.startswith(PREFIXES) or {*parts} - {"alpha"} != {DOWN, UP}]
    if odd or not any(name.startswith(UNET) for name in layers):
        raise UserError(
            f"{file}: is not a LoRA of a U-Net (with or without its CLIPs) in kohya's form; it holds "
            f"{', '.join(odd[:3] or [*layers][:3]) or 'nothing'}. pipe.load_lora_weights may take it."
        )
    # Alpha defaults to the rank, which gives a scale of 1.
    ranks = {name: parts[DOWN].shape[0] if parts[DOWN].ndim else 0 for name, parts in layers.items()}
    if empty := [name for name, rank in ranks.items() if rank < 1]:
        raise UserError(f"{file}: the rank of {', '.join(empty[:3])} is 0; it must be 1 or more.")
    scales = {
        (rank, _alpha(layers[name].get("alpha"), rank, f"{file}: '{name}.alpha'")) for name, rank in ranks.items()
    }
    if len(scales) > 1:
        raise UserError(
            f"{file}: its layers differ in (rank, alpha): {sorted(scales)}; they must all be equal. "
            "pipe.load_lora_weights takes different ones."
        )
    return scales.pop()


def _alpha(tensor: Tensor | None, rank: int, what: str) -> float:
    if tensor is None:
        return float(rank)
    return check_alpha(tensor.item() if tensor.numel() == 1 else tuple(tensor.shape), what)


def _origin(metadata: dict[str, str]) -> dict[str, str]:
    return {name: metadata[name] for name in ORIGIN if metadata.get(name)}
