"""All scores and paired differences of a report, each estimated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from agsm_rl.evaluate.intervals import Interval, win_rate
from agsm_rl.report.compare import Estimate, Quantity, estimate
from agsm_rl.report.load import Loaded, Variant
from agsm_rl.report.views import BASE, GuidanceView, base_values, measured_of, measured_of_base

Model = tuple[str, float]
"""A variant (or BASE) and a guidance."""


@dataclass
class Findings:
    """Estimates by score: of what each model reaches, and of that minus what another reaches."""

    scores: dict[tuple[str, Model], Estimate] = field(default_factory=dict)
    differences: dict[tuple[str, Model, Model], Estimate] = field(default_factory=dict)
    seeds: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    """For each pair of variants: the seeds that both have."""
    wins: dict[tuple[str, Model, Model], Interval] = field(default_factory=dict)
    """Of numbers, with one seed: how often a model's image is worth more than the other's from the same noise."""

    def score(self, score: str, view: GuidanceView, name: str) -> Estimate:
        """What a model reaches in a view."""
        return self.scores[score, (name, view.guidance[name])]

    def difference(self, score: str, view: GuidanceView, name: str, minus: str = BASE) -> Estimate | None:
        """The difference of two models in a view, in either order; None if they share no seed, or there is no base."""
        if minus not in view.guidance:
            return None
        first, second = (name, view.guidance[name]), (minus, view.guidance[minus])
        if (score, first, second) in self.differences:
            return self.differences[score, first, second]
        reverse = self.differences.get((score, second, first))
        return None if reverse is None else reverse.mirrored()


def find(loaded: Loaded, views: list[GuidanceView]) -> Findings:
    """Estimate everything that the report shows."""
    found = Findings()
    found.seeds = {
        (one.name, other.name): tuple(seed for seed in one.seeds if seed in other.seeds)
        for one, other in combinations(loaded.variants, 2)
    }
    quantities: dict[Any, Quantity] = {}
    for score in loaded.evaluation.scores:
        quantities |= _score_quantities(loaded, score)
        for view in views:
            quantities |= _difference_quantities(loaded, found, view, score)
    evaluation = loaded.evaluation
    found.wins = {
        key: _wins(quantity, loaded.evaluation.prompts)
        for key, quantity in quantities.items()
        if len(key) == 3 and not quantity.share and len(quantity.marks) == 1
    }
    for key, value in estimate(quantities, evaluation.layout).items():
        if len(key) == 2:
            found.scores[key] = value
        else:
            found.differences[key] = value
    return found


def _wins(quantity: Quantity, prompts: Sequence[str]) -> Interval:
    assert quantity.minus is not None
    by_prompt: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(row)
    rows = list(by_prompt.values())
    return win_rate([quantity.marks[0][of] for of in rows], [quantity.minus[0][of] for of in rows])


def _score_quantities(loaded: Loaded, score: str) -> dict[Any, Quantity]:
    quantities: dict[Any, Quantity] = {}
    share = loaded.evaluation.scores[score].share
    for guidance in measured_of_base(loaded):
        # The base is one model: its figures are the same for every seed.
        values = base_values(loaded, loaded.runs[0], guidance, score)
        quantities[score, (BASE, guidance)] = Quantity(values[None], share=share)
    for variant in loaded.variants:
        for guidance in measured_of(variant):
            values = _values(variant, guidance, score, variant.seeds)
            quantities[score, (variant.name, guidance)] = Quantity(values, share=share)
    return quantities


def _difference_quantities(loaded: Loaded, found: Findings, view: GuidanceView, score: str) -> dict[Any, Quantity]:
    quantities: dict[Any, Quantity] = {}
    share = loaded.evaluation.scores[score].share
    models = {name: (name, guidance) for name, guidance in view.guidance.items()}
    for variant in loaded.variants:
        if variant.has_base:
            base = np.stack([base_values(loaded, run, view.guidance[BASE], score) for run in variant.runs])
            trained = _values(variant, view.guidance[variant.name], score, variant.seeds)
            quantities[score, models[variant.name], models[BASE]] = Quantity(trained, base, share)
    for one, other in combinations(loaded.variants, 2):
        seeds = found.seeds[one.name, other.name]
        if seeds:
            first = _values(one, view.guidance[one.name], score, seeds)
            second = _values(other, view.guidance[other.name], score, seeds)
            quantities[score, models[one.name], models[other.name]] = Quantity(first, second, share)
    return quantities


def _values(variant: Variant, guidance: float, score: str, seeds: tuple[int, ...]) -> Any:
    runs = [run for run in variant.runs if run.seed in seeds]
    return np.stack([run.evaluation.trained[guidance].values[score] for run in runs])
