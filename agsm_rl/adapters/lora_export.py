"""How an exported LoRA describes itself: tensor names and metadata, as `pipe.load_lora_weights` reads them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from agsm_rl.adapters.lora_config import METADATA_KEY, LoraScale, options_by_part
from agsm_rl.adapters.lora_files import NEGATIVE_PREFIX
from agsm_rl.errors import UserError

KIND = "lora"
TEXT_PREFIX = "text_encoder"


def describe_lora(
    targets: Mapping[str, Sequence[str]], *, rank: int, alpha: float, banks: int, base: str
) -> dict[str, str]:
    """The metadata of an export: the target modules of each changed part of a pipeline (unet, text_encoder, …).

    `base` is the name of the backbone it belongs to. diffusers reads the rank, alpha and targets from this metadata.
    """
    configs = {
        f"{part}.{name}": value
        for part, modules in targets.items()
        for name, value in {"r": rank, "lora_alpha": alpha, "target_modules": list(modules)}.items()
    }
    return {"kind": KIND, "banks": str(banks), "base": base, METADATA_KEY: json.dumps(configs)}


def export_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's options of each part of a pipeline, as an export's metadata gives them."""
    if METADATA_KEY not in metadata:
        raise UserError(f"LoRA: the file's metadata '{METADATA_KEY}' is missing.")
    return options_by_part(metadata[METADATA_KEY], where=f"LoRA: the file's metadata '{METADATA_KEY}'")


def rank_and_alpha(tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, float]:
    """The rank and alpha of all layers of an export; UserError if they differ or contradict the metadata."""
    ranks = {len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    scales = [
        LoraScale.from_options(config, where=f"LoRA: the file's metadata, {part}") for part, config in configs.items()
    ]
    alphas = {alpha for scale in scales for alpha in (scale.alpha_of(""), *scale.alpha_pattern.values())}
    if len(ranks) != 1 or len(alphas) != 1:
        raise UserError(
            f"LoRA: the file's ranks are {sorted(ranks)}, its alphas {sorted(alphas)}; one of each for all layers "
            "is supported."
        )
    stated = {rank for scale in scales for rank in (scale.rank, *scale.rank_pattern.values())}
    if stated != ranks:
        raise UserError(f"LoRA: the rank of the file's tensors is {ranks.pop()}, of its metadata {sorted(stated)}.")
    return ranks.pop(), alphas.pop()


def exported_name(name: str, part: str) -> str:
    """A parameter's name in an export: `part` is the denoiser's; text encoders' layers already begin with theirs."""
    bank, _, rest = name.partition(".")
    rest = rest if rest.startswith(TEXT_PREFIX) else f"{part}.{rest}"
    return f"{NEGATIVE_PREFIX if bank == 'negative' else ''}{rest}.weight"
