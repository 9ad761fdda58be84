"""Layers of LoRA, LoHa and LoKr in kohya's and LyCORIS' form: what a file holds, as PEFT's tensors, ranks and alphas.

| | tensors of a layer, besides `alpha` | scale |
|---|---|---|
| LoRA | `lora_down.weight`, `lora_up.weight`; DoRA also `dora_scale` (out, 1) | alpha / rank |
| LoHa | `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b` | alpha / rank |
| LoKr | `lokr_w1` or `lokr_w1_a` and `lokr_w1_b`; `lokr_w2` likewise | alpha / rank; 1 where both are whole matrices |

LyCORIS' OFT is another function than PEFT's: it rotates a layer's outputs, PEFT's its inputs.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agsm_rl.adapters.lora_config import LoraScale, check_alpha
from agsm_rl.adapters.lora_names import method_of
from agsm_rl.adapters.peft_layers import MAGNITUDE
from agsm_rl.errors import UserError

DOWN, UP, DORA = "lora_down.weight", "lora_up.weight", "dora_scale"
LORA_ROLES = {DOWN: "lora_A", UP: "lora_B", DORA: MAGNITUDE}
"""A LoRA's tensors in kohya's form and in PEFT's."""
HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class Layer:
    """One layer of a file: its kind of adapter, its tensors by PEFT's names, rank, and alpha as rank times scale."""

    kind: str
    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float


def read_layers(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], file: Path) -> dict[str, Layer]:
    """A file's layers by its own names for them; UserError for tensors of any other kind.

    prefixes: those of the layers' names, that of the denoiser first; at least one layer must have it.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, role = name.partition(".")
        parts.setdefault(layer, {})[role] = tensor
    kinds = {layer: _kind(roles) if layer.startswith(prefixes) else None for layer, roles in parts.items()}
    odd = [layer for layer, kind in kinds.items() if kind is None]
    if odd or not any(layer.startswith(prefixes[0]) for layer in parts):
        methods = sorted({method for name in tensors if (method := method_of(name)) not in (None, "LoHa", "LoKr")})
        what = f" ({', '.join(map(str, methods))})" if methods else ""
        raise UserError(
            f"{file}: is not a LoRA, LoHa or LoKr of a U-Net (with or without its CLIPs) in kohya's form; it holds "
            f"{', '.join(odd[:3] or [*parts][:3]) or 'nothing'}{what}. pipe.load_lora_weights may take it."
        )
    if len(different := {*kinds.values()}) > 1:
        raise UserError(
            f"{file}: holds adapters of several kinds ({', '.join(sorted(map(str, different)))}); give one file each."
        )
    readers = {"lora": _lora, "loha": _loha, "lokr": _lokr}
    layers = {name: readers[str(kinds[name])](roles, f"{file}: '{name}'") for name, roles in parts.items()}
    if len({MAGNITUDE in layer.tensors for layer in layers.values()}) > 1:
        raise UserError(f"{file}: some of its layers have DoRA's {DORA} and others do not; all must have it, or none.")
    return layers


def common_scale(layers: Mapping[str, Layer]) -> LoraScale:
    """The most frequent rank and alpha, with a pattern for each layer that has others."""
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return LoraScale(
        rank,
        alpha,
        {f"^{name}": layer.rank for name, layer in layers.items() if layer.rank != rank},
        {f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
    )


def written(kind: str, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """A layer's tensors and alpha as a file has them, from PEFT's."""
    if kind == "lora":
        names = {peft: theirs for theirs, peft in LORA_ROLES.items()}
        roles = {names[role]: tensor for role, tensor in tensors.items()}
        if DORA in roles:  # PEFT's magnitude is (out,), or (1, out, 1, 1) for a convolution
            roles[DORA] = roles[DORA].reshape(-1, *[1] * (roles[DOWN].ndim - 1))
    else:
        roles = dict(tensors)
    if {"lokr_w1", "lokr_w2"} <= {*roles} and alpha != rank:  # its readers do not scale it
        roles["lokr_w1"], alpha = roles["lokr_w1"] * (alpha / rank), rank
    # safetensors requires separate memory for each tensor, including the alphas.
    return {role: tensor.clone() for role, tensor in roles.items()} | {"alpha": torch.tensor(float(alpha))}


def width(layer: Layer) -> int:
    """The number of a layer's inputs (times a convolution's window)."""
    tensors = layer.tensors
    if layer.kind == "lora":
        return tensors["lora_A"][0].numel()
    if layer.kind == "loha":
        return tensors["hada_w1_b"].shape[1]
    return int(_shape(tensors, "lokr_w1")[1] * _shape(tensors, "lokr_w2")[1])


def lokr_options(layers: Mapping[str, Layer], file: Path) -> dict[str, Any]:
    """PEFT's `decompose_both` and `decompose_factor` under which it makes matrices of these shapes.

    A fixed factor is w1's size in the layers that it divides, so every size seen is tried, as diffusers does.
    """
    from peft.tuners.lokr.layer import factorization

    both = any("lokr_w1_a" in layer.tensors for layer in layers.values())
    sizes = {
        name: (_shape(layer.tensors, "lokr_w1"), _shape(layer.tensors, "lokr_w2")) for name, layer in layers.items()
    }
    for factor in [-1, *sorted({size for first, _ in sizes.values() for size in first})]:
        for name, (first, second) in sizes.items():
            # Of a convolution's w2 in two factors, the window and the inputs are one number.
            sides = (0,) if "conv" in name and "lokr_w2" not in layers[name].tensors else (0, 1)
            if any(factorization(first[side] * second[side], factor) != (first[side], second[side]) for side in sides):
                break
            if not _peft_makes(layers[name], first, second, both):
                break
        else:
            return {"decompose_both": both, "decompose_factor": factor}
    raise UserError(
        f"{file}: PEFT cannot make its LoKr's matrices, whose sizes are divided in another way (LyCORIS' options "
        "unbalanced_factorization or full_matrix). Fuse it into a base with the tool it was made with."
    )


def _peft_makes(layer: Layer, first: tuple[int, int], second: tuple[int, int], both: bool) -> bool:
    """Whether PEFT keeps as whole matrices those that the layer has whole."""
    whole_first, whole_second = "lokr_w1" in layer.tensors, "lokr_w2" in layer.tensors
    return whole_second == (layer.rank >= max(second) / 2) and whole_first == (not both or layer.rank >= max(first) / 2)


def _kind(roles: Mapping[str, Tensor]) -> str | None:
    held = {*roles} - {"alpha"}
    if held - {DORA} == {DOWN, UP}:
        return "lora"
    if held == {*HADA}:
        return "loha"
    factors = [
        {f"lokr_{factor}"} if f"lokr_{factor}" in held else {f"lokr_{factor}_a", f"lokr_{factor}_b"}
        for factor in ("w1", "w2")
    ]
    return "lokr" if held == factors[0] | factors[1] else None


def _lora(roles: Mapping[str, Tensor], what: str) -> Layer:
    down, up = roles[DOWN], roles[UP]
    rank = _rank(down, 0, what)
    tensors = {LORA_ROLES[role]: tensor.float() for role, tensor in roles.items() if role != "alpha"}
    if DORA in roles:
        if roles[DORA].shape != (len(up), *[1] * (down.ndim - 1)):
            raise UserError(
                f"{what}: its {DORA} has shape {tuple(roles[DORA].shape)}; only lengths of the weight's rows, "
                f"{(len(up), *[1] * (down.ndim - 1))}, are supported (LyCORIS: wd_on_output). Fuse it into a base with "
                "the tool it was made with."
            )
        outputs = (len(up),) if down.ndim == 2 else (1, len(up), *[1] * (down.ndim - 2))
        tensors[MAGNITUDE] = tensors[MAGNITUDE].reshape(outputs)
    return Layer("lora", tensors, rank, _alpha(roles, rank, what))


def _loha(roles: Mapping[str, Tensor], what: str) -> Layer:
    rank = _rank(roles["hada_w1_b"], 0, what)
    return Layer("loha", {name: roles[name].float() for name in HADA}, rank, _alpha(roles, rank, what))


def _lokr(roles: Mapping[str, Tensor], what: str) -> Layer:
    tensors = {name: tensor.float() for name, tensor in roles.items() if name != "alpha"}
    factored = [name for name in ("lokr_w2_a", "lokr_w1_a") if name in tensors]
    if any(tensor.ndim < 2 for tensor in tensors.values()):
        raise UserError(f"{what}: its matrices must have two dimensions or more.")
    if factored:
        rank = _rank(tensors[factored[0]], 1, what)
        return Layer("lokr", tensors, rank, _alpha(roles, rank, what))
    # Whole matrices are not scaled, whatever alpha says. PEFT makes them whole from half of their size.
    rank = (max(*tensors["lokr_w2"].shape[:2], *tensors["lokr_w1"].shape) + 1) // 2
    return Layer("lokr", tensors, rank, float(rank))


def _shape(tensors: Mapping[str, Tensor], factor: str) -> tuple[int, int]:
    """The size of w1 or w2, whole or in two factors."""
    if factor in tensors:
        return tensors[factor].shape[0], tensors[factor].shape[1]
    return tensors[f"{factor}_a"].shape[0], tensors[f"{factor}_b"].shape[1]


def _rank(tensor: Tensor, side: int, what: str) -> int:
    rank = tensor.shape[side] if tensor.ndim > side else 0
    if rank < 1:
        raise UserError(f"{what}: its rank is 0; it must be 1 or more.")
    return rank


def _alpha(roles: Mapping[str, Tensor], rank: int, what: str) -> float:
    """Alpha, which is the rank where a file has none: a scale of 1."""
    if "alpha" not in roles:
        return float(rank)
    value = roles["alpha"]
    return check_alpha(value.item() if value.numel() == 1 else tuple(value.shape), f"{what[:-1]}.alpha'")
