"""LoRA in kohya's form, which ComfyUI and A1111 take: `lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`.

A form for U-Nets, with one set of weights: the positive bank. `pipe.load_lora_weights` reads it too.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from torch import Tensor

from agsm_rl.adapters.lora import NEGATIVE_PREFIX, LoRA
from agsm_rl.adapters.soft_tokens import BACKBONES, BASE_OF_WIDTH
from agsm_rl.attachment import read_safetensors, write_export
from agsm_rl.errors import UserError

PREFIX = "lora_unet_"
DOWN, UP = "lora_down.weight", "lora_up.weight"
OURS = ".lora_A.weight"
ORIGIN = ("base", "backbone", "checkpoint", "objectives", "recipe_sha256", "step", "version")
"""What an export's metadata tells of where it comes from; all else is of the form."""


def write_kohya(tensors: dict[str, Tensor], metadata: dict[str, str], out: Path) -> None:
    """Write the positive bank of an exported LoRA; UserError for SD3's, whose transformer the form has no names for."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(NEGATIVE_PREFIX)}
    if not all(name.startswith("unet.") for name in own):
        raise UserError(
            "--to kohya: a form for U-Nets (SD1.5, SDXL). ComfyUI and diffusers take SD3's LoRA as it was exported"
        )
    converted = convert_state_dict_to_kohya(own)
    alpha = torch.tensor(float(LoRA.from_export(tensors, metadata).alpha))  # diffusers writes the rank
    converted = {name: alpha if name.endswith(".alpha") else tensor for name, tensor in converted.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    # safetensors wants an own memory for each tensor, the alphas too.
    write_export(out, {name: tensor.clone() for name, tensor in converted.items()}, _origin(metadata))


def read_kohya(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of our export; layers may have diffusers' names or SDXL's original ones.

    UserError for what is no such LoRA, also changes text encoders, or has layers of different rank or alpha.
    """
    tensors, metadata = read_safetensors(file)
    if "kind" in metadata:
        raise UserError(f"{file}: is agsm-rl's own export, attach() takes it; other forms: agsm, softrepa, kohya.")
    rank, alpha = _rank_and_alpha(tensors, file)
    try:
        # Original names count SDXL's blocks through; its U-Net has two layers in each.
        unet = SimpleNamespace(layers_per_block=2)
        renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=unet)
    except (ValueError, LookupError) as error:
        raise UserError(f"{file}: has layers that diffusers finds no place for in a U-Net ({error}).") from error
    own = {name: tensor.float() for name, tensor in convert_unet_state_dict_to_peft(renamed).items()}
    # Whole names, not ends of names: a file may have some blocks only.
    layers = [name.removeprefix("unet.").removesuffix(OURS) for name in own if name.endswith(OURS)]
    widths = [own[f"unet.{layer}{OURS}"].shape[1] for layer in layers if layer.endswith("attn2.to_k")]
    lora = LoRA(rank=rank, alpha=alpha, target_modules=tuple(layers))
    base = BACKBONES.get(BASE_OF_WIDTH.get(widths[0], ""), "") if widths else ""
    return own, {**lora.describe("unet", base=base), "name": "lora", **_origin(metadata)}


def _rank_and_alpha(tensors: dict[str, Tensor], file: Path) -> tuple[int, float]:
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        layers[layer][part] = tensor
    odd = [name for name, parts in layers.items() if not name.startswith(PREFIX) or {*parts} - {"alpha"} != {DOWN, UP}]
    if odd or not layers:
        raise UserError(
            f"{file}: is no LoRA of a U-Net alone in kohya's form, it holds {', '.join(odd[:3]) or 'nothing'}. Others "
            "may go into pipe.load_lora_weights."
        )
    # Where alpha is left out it is the rank, for a scale of 1.
    ranks = {name: len(parts[DOWN]) for name, parts in layers.items()}
    found = {(rank, float(layers[name].get("alpha", torch.tensor(rank)))) for name, rank in ranks.items()}
    if len(found) > 1:
        raise UserError(
            f"{file}: the (rank, alpha) of its layers are {sorted(found)}; one for all is supported. "
            "pipe.load_lora_weights takes several."
        )
    return found.pop()


def _origin(metadata: dict[str, str]) -> dict[str, str]:
    return {name: metadata[name] for name in ORIGIN if metadata.get(name)}
