"""The old policy of a term: a copy of the adapters that follows the trained ones by a schedule of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agsm_rl.errors import UserError


@dataclass(frozen=True)
class OldPolicy:
    """When a term's old policy follows the trained parameters, and how far: old ← decay · old + (1 − decay) · live.

    Args:
        decay: Share of the old policy that stays at an update, in [0, 1]: a number, or a schedule {step: decay} of the
            run's steps, with linear pieces between. 0 copies the trained parameters.
        every: `draw`: after the last step that learns from a draw; or a number of the term's turns (its `every` and
            `offset`), also those of weight 0.
    """

    decay: float | Mapping[int, float] = 0.0
    every: int | Literal["draw"] = "draw"

    def __post_init__(self) -> None:
        points = self.decay if isinstance(self.decay, Mapping) else {0: self.decay}
        if not points:
            raise UserError("old.decay: the schedule is empty; give a number, or {step: decay}")
        for step, decay in points.items():
            if int(step) < 0:
                raise UserError(f"old.decay: a schedule's keys are steps from 0 on; got {step}")
            if not 0 <= decay <= 1:
                raise UserError(f"old.decay: got {decay}, but it must lie in [0, 1]")
        if self.every != "draw" and (isinstance(self.every, str) or self.every < 1):
            raise UserError(f"old.every: got {self.every!r}, but it must be 'draw', or a number of steps from 1 on")

    def decay_at(self, step: int) -> float:
        """The decay at a step (counted from 0)."""
        if not isinstance(self.decay, Mapping):
            return float(self.decay)
        points = sorted((int(at), value) for at, value in self.decay.items())
        return float(np.interp(step, [at for at, _ in points], [value for _, value in points]))

    def is_due(self, turn: int, *, unlearned: int) -> bool:
        """Whether it is updated after a turn of its term (counted from 0), with so many shares of the draw left."""
        return unlearned == 0 if self.every == "draw" else (turn + 1) % int(self.every) == 0
