"""The rank and alpha of each layer: from an adapter's options to PEFT's and to files, and back.

LoRA, LoHa and LoKr scale what they add by alpha / rank. Files say alpha as rank times scale: rank-stabilised LoRA,
whose scale is alpha / √rank, is folded into alpha, so that readers which divide alpha by the rank get the right scale.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from agsm_rl.adapters.lora_config import LoraScale, alpha_pattern, check_alpha, rank_pattern
from agsm_rl.adapters.lora_export import TEXT_PREFIX, layers_of
from agsm_rl.errors import UserError

MAX_RANK = 4096
"""Wider than the layers themselves; a typo here would allocate all memory."""


def scale_of_options(
    kind: str,
    rank: int,
    alpha: float | None,
    ranks: Mapping[str, int] | None,
    alphas: Mapping[str, float] | None,
    *,
    rslora: bool = False,
) -> LoraScale:
    """An adapter's options as one scale; UserError for values that cannot be. Null for alpha means the rank."""
    for each in (rank, *rank_pattern(ranks, kind).values()):
        if not 1 <= each <= MAX_RANK:
            raise UserError(f"{kind}.rank{'' if each is rank else '_pattern'}: {each}; allowed: 1 to {MAX_RANK}.")
    if alpha is not None:
        check_alpha(alpha, f"{kind}.alpha")
    if rslora and alpha is None:
        raise UserError(
            f"{kind}.use_rslora: needs `alpha`, which it divides by the rank's square root; with the default, the "
            f"rank, the scale would grow with the rank. `alpha: {rank**0.5:.3g}` gives this rank a scale of 1."
        )
    return LoraScale(
        rank, rank if alpha is None else alpha, rank_pattern(ranks, kind), alpha_pattern(alphas, kind), rslora
    )


def peft_scale(scale: LoraScale, part: str, layers: Mapping[str, str], *, alpha: str) -> dict[str, Any]:
    """PEFT's options for one part of a pipeline: `r`, alpha under PEFT's name for it, and the layers that differ.

    layers: the modules by their names in the model; the values are their names in files.
    """
    first = LoraScale(scale.rank, scale.alpha, rslora=scale.rslora)
    options: dict[str, Any] = {"r": first.rank_of(""), alpha: first.alpha_of("")}
    names = {name: f"{part}.{in_files}" for name, in_files in layers.items()}
    different: dict[str, dict[str, float]] = {
        "rank_pattern": {name: scale.rank_of(layer) for name, layer in names.items()},
        "alpha_pattern": {name: scale.alpha_of(layer) for name, layer in names.items()},
    }
    for option, usual in (("rank_pattern", options["r"]), ("alpha_pattern", options[alpha])):
        if pattern := {_pattern(part, name): value for name, value in different[option].items() if value != usual}:
            options[option] = pattern
    return options


def _pattern(part: str, name: str) -> str:
    """A module's whole name as PEFT's patterns have it, for every version of transformers."""
    return name.removeprefix("text_model.") if part.startswith(TEXT_PREFIX) else f"^{name}"


def options_of_export(
    tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], *, title: str, kind: str, alpha: str
) -> dict[str, Any]:
    """The constructor's `rank`, `alpha` and their patterns for an export, from its metadata by part of the pipeline."""
    scales = scales_of_export(configs, title=title, kind=kind, alpha=alpha)
    usual = next(scale for part, scale in scales.items() if not part.startswith(TEXT_PREFIX))
    first = LoraScale(usual.rank, usual.alpha, rslora=usual.rslora)
    ranks, alphas = {}, {}
    for layer in layers_of(tensors):
        part, _, module = layer.partition(".")
        if part in scales and scales[part].rank_of(module) != first.rank:
            ranks[f"^{layer}"] = scales[part].rank_of(module)
        if part in scales and scales[part].alpha_of(module) != first.alpha_of(""):
            alphas[f"^{layer}"] = scales[part].alpha_of(module)
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return {"rank": first.rank, "alpha": first.alpha_of("")} | {
        name: value for name, value in patterns.items() if value
    }


def scales_of_export(
    configs: Mapping[str, Mapping[str, Any]], *, title: str, kind: str, alpha: str
) -> dict[str, LoraScale]:
    """The scale of each part of a pipeline that an export's metadata describes."""
    return {
        part: LoraScale.from_options(config, where=f"{title}: the file's metadata, {part}", kind=kind, alpha=alpha)
        for part, config in configs.items()
    }


def check_alphas(scale: LoraScale, tensors: Mapping[str, Tensor], scales: Mapping[str, LoraScale], title: str) -> None:
    """UserError if an export's layers have other alphas than an adapter's, so that they would act more or less."""
    for layer in layers_of(tensors):
        part, _, module = layer.partition(".")
        theirs, ours = scales[part].alpha_of(module), scale.alpha_of(layer)
        if abs(theirs - ours) > 1e-6 * ours:
            remedy = f"Set `alpha: {theirs:g}`."
            if scale.rslora or scale.alpha_pattern:
                remedy = f"Both are rank times scale, of '{layer}'; set `alpha` and `alpha_pattern` accordingly."
            raise UserError(
                f"{title}: alpha is {theirs:g} in the file, {ours:g} here: its weights would be applied at "
                f"{ours / theirs:g} times their strength. {remedy}"
            )
