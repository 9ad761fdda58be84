"""Figures of gradients: their norms, the angles between them, and all of them as plain numbers."""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from agsm_rl.training.combine import Gradient


def as_numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, fetched together so that a GPU is waited for only once."""
    if not figures:
        return {}
    device = next(iter(figures.values())).device
    together = torch.stack([figure.to(device, torch.float32) for figure in figures.values()])
    return dict(zip(figures, together.tolist(), strict=True))


def norm(gradient: Gradient) -> Tensor:
    """The L2 norm over all parameters, 0-d; 0 for no parameters."""
    if not gradient:
        return torch.zeros(())
    return torch.stack([value.float().norm() for value in gradient.values()]).norm()


def cosines(gradients: dict[str, Gradient]) -> dict[str, float]:
    """The cosine between each two terms' gradients, over the parameters that both reach."""
    figures: dict[str, float] = {}
    for (first, left), (second, right) in combinations(gradients.items(), 2):
        common = [name for name in left if name in right]
        product = sum((left[name].float() * right[name].float()).sum() for name in common)
        size = norm({name: left[name] for name in common}) * norm({name: right[name] for name in common})
        if common and size > 0:
            figures[f"cosine/{first}/{second}"] = float(product / size)
    return figures
