"""What a step costs in passes through the denoiser, counted while its memory is rehearsed, and what could be shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from agsm_rl.interfaces import Cond
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block


@dataclass
class Passes:
    """Rows that went through the denoiser: `forward` all of them, `backward` those that gradients come back through.

    With guidance an image is two rows.
    """

    forward: float = 0
    backward: float = 0

    def __str__(self) -> str:
        back = f" and {self.backward:,.0f} backward" if self.backward else ""
        return f"{self.forward:,.0f} forward{back}"


class PassCounter:
    """Counts the rows of a backbone's predictions by phase. `repeats`: for how many passes one that is made stands."""

    def __init__(self) -> None:
        self.phases: dict[str, Passes] = {}
        self.repeats = 1.0

    def counted(self, predict: Callable[..., Tensor], phase: Callable[[], str]) -> Callable[..., Tensor]:
        """`predict`, counted into the phase of the moment."""

        def counting(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            prediction = predict(x_t, t, cond)
            passes = self.phases.setdefault(phase(), Passes())
            passes.forward += self.repeats * len(x_t)
            if torch.is_grad_enabled() and prediction.requires_grad:
                passes.backward += self.repeats * len(x_t)
            return prediction

        return counting


def drawn_alike(recipe: Recipe) -> list[tuple[str, str]]:
    """Terms that each draw images of their own from equal blocks, and could share one draw."""
    drawing = [
        (term.name or term.use, term.source)
        for term in recipe.objectives
        if isinstance(term.source, Block) and "images_per_prompt" in term.source.options
    ]
    return [(first, second) for (first, one), (second, other) in combinations(drawing, 2) if one == other]
