"""All scores and paired differences of a report, each estimated once."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from agsm_rl.report.compare import Estimate, Quantity, estimate
from agsm_rl.report.load import Loaded, Variant
from agsm_rl.report.views import BASE, GuidanceView, base_marks, measured_of, measured_of_base

Model = tuple[str, float]
"""A variant (or BASE) and a guidance."""


@dataclass
class Findings:
    """Estimates by verdict: of each model's score, and of a model's score minus another's."""

    scores: dict[tuple[str, Model], Estimate] = field(default_factory=dict)
    differences: dict[tuple[str, Model, Model], Estimate] = field(default_factory=dict)
    seeds: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    """For each pair of variants: the seeds that both have."""

    def score(self, verdict: str, view: GuidanceView, name: str) -> Estimate:
        """A model's score in a view."""
        return self.scores[verdict, (name, view.guidance[name])]

    def difference(self, verdict: str, view: GuidanceView, name: str, minus: str = BASE) -> Estimate | None:
        """The difference of two models in a view, in either order; None if they share no seed."""
        first, second = (name, view.guidance[name]), (minus, view.guidance[minus])
        if (verdict, first, second) in self.differences:
            return self.differences[verdict, first, second]
        reverse = self.differences.get((verdict, second, first))
        return None if reverse is None else reverse.mirrored()


def find(loaded: Loaded, views: list[GuidanceView]) -> Findings:
    """Estimate everything that the report shows."""
    found = Findings()
    found.seeds = {
        (one.name, other.name): tuple(seed for seed in one.seeds if seed in other.seeds)
        for one, other in combinations(loaded.variants, 2)
    }
    quantities: dict[Any, Quantity] = {}
    for verdict in loaded.evaluation.verdicts:
        quantities |= _score_quantities(loaded, verdict)
        for view in views:
            quantities |= _difference_quantities(loaded, found, view, verdict)
    evaluation = loaded.evaluation
    for key, value in estimate(quantities, evaluation.tags, evaluation.tag_names, evaluation.prompts).items():
        if len(key) == 2:
            found.scores[key] = value
        else:
            found.differences[key] = value
    return found


def _score_quantities(loaded: Loaded, verdict: str) -> dict[Any, Quantity]:
    quantities: dict[Any, Quantity] = {}
    for guidance in measured_of_base(loaded):
        # The base is one model: its verdicts are the same for every seed.
        quantities[verdict, (BASE, guidance)] = Quantity(base_marks(loaded, loaded.runs[0], guidance, verdict)[None])
    for variant in loaded.variants:
        for guidance in measured_of(variant):
            quantities[verdict, (variant.name, guidance)] = Quantity(_marks(variant, guidance, verdict, variant.seeds))
    return quantities


def _difference_quantities(loaded: Loaded, found: Findings, view: GuidanceView, verdict: str) -> dict[Any, Quantity]:
    quantities: dict[Any, Quantity] = {}
    models = {name: (name, guidance) for name, guidance in view.guidance.items()}
    for variant in loaded.variants:
        base = np.stack([base_marks(loaded, run, view.guidance[BASE], verdict) for run in variant.runs])
        trained = _marks(variant, view.guidance[variant.name], verdict, variant.seeds)
        quantities[verdict, models[variant.name], models[BASE]] = Quantity(trained, base)
    for one, other in combinations(loaded.variants, 2):
        seeds = found.seeds[one.name, other.name]
        if seeds:
            first = _marks(one, view.guidance[one.name], verdict, seeds)
            second = _marks(other, view.guidance[other.name], verdict, seeds)
            quantities[verdict, models[one.name], models[other.name]] = Quantity(first, second)
    return quantities


def _marks(variant: Variant, guidance: float, verdict: str, seeds: tuple[int, ...]) -> Any:
    runs = [run for run in variant.runs if run.seed in seeds]
    return np.stack([run.evaluation.trained[guidance].marks[verdict] for run in runs])
