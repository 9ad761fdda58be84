"""How the terms' gradients become one. A gradient maps parameter names to tensors; what it does not reach is absent."""

from collections.abc import Callable

from torch import Tensor

from agsm_rl.errors import unknown_name

Gradient = dict[str, Tensor]
Combiner = Callable[[list[Gradient]], Gradient]


def weighted_sum(gradients: list[Gradient]) -> Gradient:
    """The sum of the terms' gradients (each already has its weight)."""
    total: Gradient = {}
    for gradient in gradients:
        for name, value in gradient.items():
            total[name] = total[name] + value if name in total else value
    return total


COMBINERS: dict[str, Combiner] = {"sum": weighted_sum}


def find_combiner(name: str) -> Combiner:
    """The combiner of that name; UserError lists what there is."""
    if name not in COMBINERS:
        raise unknown_name("combine", name, "a combiner", COMBINERS)
    return COMBINERS[name]
