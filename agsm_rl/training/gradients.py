"""Figures of gradients: their norms, the angles between them, and all of them as plain numbers."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from agsm_rl.training.combine import Gradient

FEWEST_STEPS = 3
"""Denoising steps between which a gradient's shares are worth a look."""


def as_numbers(figures: Sequence[Tensor]) -> list[float]:
    """0-d tensors as numbers, fetched together so that a GPU is waited for only once."""
    if not figures:
        return []
    device = figures[0].device
    return torch.stack([figure.to(device, torch.float32) for figure in figures]).tolist()


def norm(gradient: Gradient) -> Tensor:
    """The L2 norm over all parameters, 0-d; 0 for no parameters."""
    if not gradient:
        return torch.zeros(())
    return torch.stack([value.float().norm() for value in gradient.values()]).norm()


def largest_share(norms: Mapping[int, float]) -> dict[str, float]:
    """What part of a term's gradient its heaviest denoising step carries: `step_share` in (0, 1], `heaviest_step`.

    `norms`: the length of the gradient of each step k. Nothing for fewer than three steps, of which one may well have
    more than half, or where no step has a gradient.
    """
    total = sum(norms.values())
    if len(norms) < FEWEST_STEPS or not 0 < total < float("inf"):
        return {}
    heaviest = max(norms, key=norms.__getitem__)
    return {"step_share": norms[heaviest] / total, "heaviest_step": float(heaviest)}


def cosines(gradients: dict[str, Gradient]) -> dict[str, float]:
    """The cosine between each two terms' gradients, over the parameters that both reach."""
    figures: dict[str, float] = {}
    for (first, left), (second, right) in combinations(gradients.items(), 2):
        common = [name for name in left if name in right]
        product = sum((left[name].float() * right[name].float()).sum() for name in common)
        size = norm({name: left[name] for name in common}) * norm({name: right[name] for name in common})
        if common and size > 0:
            # Rounding may leave the cosine of equal gradients just above 1.
            figures[f"cosine/{first}/{second}"] = max(-1.0, min(float(product / size), 1.0))
    return figures
