"""Where in the model, and at which noise levels, terms agree or fight: their gradients' cosines by block and level.

A loss depends on the trained parameters through the rows of its predictions alone, so its gradient is the sum of what
each row sends back. Sending back the rows of one range of noise levels at a time takes the gradient apart, exactly, for
every objective whose predictions do not follow from one another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from agsm_rl.interfaces import Batch, RolloutBatch
from agsm_rl.term import Term
from agsm_rl.training.combine import Gradient
from agsm_rl.training.gradients import cosines, norm
from agsm_rl.training.randomness import Draw
from agsm_rl.training.row_shares import RowShare

if TYPE_CHECKING:
    from agsm_rl.trainer import Trainer

BLOCK = re.compile(r"(?:^|\.)(\w*(?:block|layer)s?(?:\.\d+)?)(?=\.|$)")


class Learned(NamedTuple):
    """A term that learned in this step, and from what."""

    term: Term
    batch: Batch
    share: RowShare


class GradientMap:
    """Looks at the gradients of a stack every few steps; the training is not changed by it.

    Args:
        every: Look in one of every this many steps.
        levels: Number of ranges of equal width into which [0, 1), the noise levels, is divided.

    A look costs each term its forward pass and `levels + 1` backward passes again.
    """

    def __init__(self, every: int, levels: int = 5) -> None:
        self.every, self.levels = every, levels
        self.newest: dict[str, Any] | None = None
        """What the newest step's look saw, as plain data; None in a step without one."""

    def look(self, trainer: Trainer, learned: Sequence[Learned]) -> None:
        """Take the gradients of this step's terms apart, where two or more have learned."""
        self.newest = None
        if trainer.step % self.every or len(learned) < 2:
            return
        found = {item.term.name: self._by_level(trainer, item) for item in learned}
        taken = {name: gradients for name, gradients in found.items() if gradients}
        blocks = list(dict.fromkeys(block_of(name) for name in trainer.parameters))
        self.newest = {
            "edges": [level / self.levels for level in range(self.levels + 1)],
            "blocks": blocks,
            "norms": {
                name: [[_finite(float(norm(_within(gradient, block)))) for block in blocks] for gradient in gradients]
                for name, gradients in taken.items()
            },
            "cosines": _cosines(taken, blocks, self.levels),
            "left_out": [name for name in found if name not in taken],
        }

    def _by_level(self, trainer: Trainer, item: Learned) -> list[Gradient]:
        """The term's gradient by noise level, over the rows of all processes; empty where it cannot be taken apart."""
        term, policy = item.term, trainer.policy
        parameters = policy.parameters(term.trains)
        sums = [
            {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
            for _ in range(self.levels)
        ]
        policy.draw = Draw(trainer.seed, term.name, trainer.step, t_range=term.t)
        policy.acting_for = term.name
        seen, whole = False, True
        batch = item.batch
        if isinstance(batch, RolloutBatch):
            batch = replace(batch, graph=None)  # which the step has used up
        for part, weight in term.objective.split(batch) if len(batch) else ():
            with policy.recording() as recorded, trainer.accelerator.autocast():
                loss, _ = term.objective.loss(policy, part)
            rows = [row for row in recorded if row.prediction.requires_grad]
            if not rows or any(row.follows for row in rows):
                whole = False
                break
            seen = True
            outputs = [row.prediction for row in rows]
            sent = torch.autograd.grad(
                loss * weight * item.share.weight, outputs, retain_graph=True, materialize_grads=True
            )
            for level, total in enumerate(sums):
                masks = [self._in_level(row.t, level) for row in rows]
                if any(mask.any() for mask in masks):
                    _add(total, parameters, outputs, [_masked(*pair) for pair in zip(sent, masks, strict=True)])
        if not trainer.processes.numbers(float(seen)).any() or not trainer.processes.numbers(float(whole)).all():
            return []
        return [
            dict(zip(total, trainer.processes.mean(list(total.values())), strict=True)) if total else {}
            for total in sums
        ]

    def _in_level(self, t: Tensor, level: int) -> Tensor:
        """Which rows' noise levels are in a range; a flow's first level, 1, is in the last one."""
        return (t * self.levels).floor().clamp(0, self.levels - 1) == level


def block_of(parameter: str) -> str:
    """The adapter and the block of the model that a parameter "adapter.path" belongs to, for people."""
    adapter, _, path = parameter.partition(".")
    path = re.sub(r"^(positive|negative)\.", "", path)
    if path.startswith("text_encoder"):
        return f"{adapter}: {path.partition('.')[0]}"
    found = BLOCK.search(path)
    return f"{adapter}: {found.group(1) if found else path.partition('.')[0]}"


def _add(total: Gradient, parameters: dict[str, Any], outputs: list[Tensor], sent: list[Tensor]) -> None:
    """Add what these rows send back to the parameters."""
    got = torch.autograd.grad(
        outputs, list(parameters.values()), grad_outputs=sent, retain_graph=True, allow_unused=True
    )
    for name, value in zip(parameters, got, strict=True):
        if value is not None:
            total[name] += value.float()


def _masked(sent: Tensor, mask: Tensor) -> Tensor:
    return sent * mask.to(sent).view(-1, *[1] * (sent.dim() - 1))


def _within(gradient: Gradient, block: str) -> Gradient:
    return {name: value for name, value in gradient.items() if block_of(name) == block}


def _cosines(taken: dict[str, list[Gradient]], blocks: list[str], levels: int) -> dict[str, list[list[float | None]]]:
    """By pair of terms, "first/second": a row per level, a number per block; None where one of them has no gradient."""
    found: dict[str, list[list[float | None]]] = {}
    for level in range(levels):
        for column, block in enumerate(blocks):
            here = {name: _within(gradients[level], block) for name, gradients in taken.items()}
            for key, value in cosines(here).items():
                pair = key.removeprefix("cosine/")
                found.setdefault(pair, [[None] * len(blocks) for _ in range(levels)])[level][column] = _finite(value)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
