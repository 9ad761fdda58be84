"""How the terms' gradients become one. A gradient maps parameter names to tensors; what it does not reach is absent.

The conflict-aware combiners are TorchJD's (arXiv 2406.16232); so few parameters are trained that all gradients can be
kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

Gradient = dict[str, Tensor]
Combiner = Callable[[list[Gradient], int], Gradient]
"""`combine(gradients, seed)`: the terms' gradients, already weighted, to one."""

AGGREGATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "upgrad": ("UPGrad", {}),
    "pcgrad": ("PCGrad", {}),
    "mgda": ("MGDA", {}),
    "cagrad": ("CAGrad", {"c": 0.5}),
}
"""Name → TorchJD's class and its arguments; c = 0.5 is CAGrad's (arXiv 2110.14048)."""

COMBINERS = ("sum", *AGGREGATORS)


def weighted_sum(gradients: list[Gradient], seed: int = 0) -> Gradient:
    """The sum of the terms' gradients."""
    total: Gradient = {}
    for gradient in gradients:
        for name, value in gradient.items():
            total[name] = total[name] + value if name in total else value
    return total


def find_combiner(name: str) -> Combiner:
    """The combiner of that name; UserError lists the names, or says what to install."""
    if name == "sum":
        return weighted_sum
    if name not in AGGREGATORS:
        raise unknown_name("combine", name, "a combiner", COMBINERS)
    try:
        from torchjd import aggregation

        kind, options = AGGREGATORS[name]
        found = getattr(aggregation, kind)
        found(**options)  # its own requirements are imported here
    except ImportError as error:
        raise UserError(
            f"combine: '{name}' is TorchJD's, which is not installed ({error}); run `pip install 'agsm-rl[torchjd]'`, "
            f"or use 'sum'"
        ) from error

    def combine(gradients: list[Gradient], seed: int) -> Gradient:
        if len(gradients) < 2:
            return weighted_sum(gradients)
        # As a sum, not as a mean: where nothing conflicts, UPGrad then gives the very sum.
        wanted = {"pref_vector": torch.ones(len(gradients))} if name == "upgrad" else {}
        return _aggregate(found(**options, **wanted), gradients, seed)

    return combine


def _aggregate(aggregator: Any, gradients: list[Gradient], seed: int) -> Gradient:
    """The terms' gradients as rows of one matrix, over the parameters that any of them reaches, made one by TorchJD."""
    like = weighted_sum(gradients)
    rows = [
        torch.cat([gradient.get(name, torch.zeros_like(value)).flatten().float() for name, value in like.items()])
        for gradient in gradients
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PCGrad takes the terms in a random order
        found = aggregator(torch.stack(rows).cpu())
    parts = found.split([value.numel() for value in like.values()])
    return {name: part.view_as(value).to(value) for (name, value), part in zip(like.items(), parts, strict=True)}
