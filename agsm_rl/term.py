"""A term: an objective in a run, with where it learns from, how much it counts, when it is due and what it trains."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from agsm_rl.errors import UserError
from agsm_rl.policy import Objective, Source, View
from agsm_rl.training.defaults import with_defaults


@dataclass
class Term:
    """An objective in a run.

    `weight` is a number or a piecewise-linear schedule {step: weight}; `every` k runs the term every k steps,
    starting at step `offset` (counted from 0), so that terms can alternate; `t` is the range of noise levels it
    draws from; `trains` names the adapters it trains (None: all).
    """

    objective: Objective
    source: Source
    name: str = "objective"
    weight: float | Mapping[int, float] = 1.0
    every: int = 1
    offset: int = 0
    t: tuple[float, float] = (0.0, 1.0)
    trains: list[str] | None = None
    source_name: str | None = None
    """The name of a shared source, so that its random numbers do not depend on which terms learn from it."""
    view: View | None = None
    """What the term sees of the source's batch (None: all of it)."""

    def __post_init__(self) -> None:
        with_defaults(self.objective, Objective)
        with_defaults(self.source, Source)
        if self.view is not None:
            with_defaults(self.view, View)
        consumes, gives, giver = self.objective.consumes, self.source.gives, "source"
        if self.view is not None:
            if not issubclass(gives, self.view.consumes):
                raise UserError(
                    f"{self.name}: its view needs a {self.view.consumes.__name__}, but its source gives a "
                    f"{gives.__name__}"
                )
            check_view(self.view, self.source, where=f"{self.name}: view")
            gives, giver = self.view.gives, "view"
        if not issubclass(gives, consumes):
            raise UserError(
                f"{self.name}: it learns from a {consumes.__name__}, but its {giver} gives a {gives.__name__}"
                f"{consumes.given_by}"
            )
        check_source(self.objective, self.source, where=f"{self.name}: source")
        if self.every < 1:
            raise UserError(f"{self.name}: every is {self.every}, but it must be 1 or more")
        if self.offset < 0:
            raise UserError(f"{self.name}: offset is {self.offset}, but it must be 0 or more")
        if not 0 <= self.t[0] < self.t[1] <= 1:
            raise UserError(f"{self.name}: t is {list(self.t)}, but it must be [low, high] with 0 <= low < high <= 1")
        check_range(self.t, self.objective, where=f"{self.name}: t")

    def weight_at(self, step: int) -> float:
        """The weight at a step (counted from 0)."""
        if isinstance(self.weight, Mapping):
            points = sorted(self.weight.items())
            return float(np.interp(step, [at for at, _ in points], [value for _, value in points]))
        return float(self.weight)

    def is_due(self, step: int) -> bool:
        """Whether it learns in a step (counted from 0)."""
        return step >= self.offset and (step - self.offset) % self.every == 0 and self.weight_at(step) != 0

    def turn(self, step: int) -> int:
        """How often it would have learned before a step (counted from 0), were its weight never 0."""
        return max(0, -((self.offset - step) // self.every))


def check_range(t: tuple[float, float], objective: Objective, *, where: str) -> None:
    """UserError for a range of noise levels if the objective draws none."""
    if tuple(t) != (0.0, 1.0) and not objective.draws_t:
        raise UserError(
            f"{where} is {list(t)}, but {type(objective).__name__} learns from sampling steps and "
            "draws no noise levels; leave it out"
        )


def check_source(objective: Objective, source: Source, *, where: str) -> None:
    """UserError for a source whose batches lack what the objective learns from."""
    try:
        objective.check_source(source)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_view(view: View, source: Source, *, where: str) -> None:
    """UserError for a source that would always leave the view empty."""
    try:
        view.check(source)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
