"""The scores of a run's evaluations: the best so far, and whether a score has fallen too far below its best.

All evaluations of a run use the same prompts and noise, so any two of them can be compared image by image.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from agsm_rl.evaluate.intervals import CONFIDENCE
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.rewards import directions
from agsm_rl.recipe.suites import find_score, make_suites
from agsm_rl.training.anomalies import Event

START = 0
"""The step of the base: a run starts as the base model, unless it starts from other adapters."""


class ScoreHistory:
    """The scores of the evaluations that matter: the best one by each score, the base, and the newest.

    For each evaluation it keeps the mean of every score, and each reward's scores of the images [N].
    """

    def __init__(self, recipe: Recipe) -> None:
        suites = make_suites(recipe.evaluate, recipe.parts) if recipe.evaluate else []
        full_name = partial(find_score, suites=suites, where=recipe.parts.where)
        self.best_by = full_name(recipe.checkpoint.best) if recipe.checkpoint.best else None
        self.rules = {full_name(name): rule.falls_by for name, rule in recipe.stop_when.items()}
        self.smaller_is_better = {name for entry in suites for name in entry.smaller_is_better()}
        self.on_fall = recipe.watch.held_out_falls
        self.directions = directions(recipe)
        self._settings = _settings(recipe)
        self.starts_as_base = recipe.start_from is None
        self._means: dict[int, dict[str, float]] = {}
        self._scores: dict[int, dict[str, Tensor]] = {}
        self._best: dict[str, int] = {}
        self.comparable_from = START
        """The first step whose evaluation has the settings of today."""
        self.newest: int | None = None
        """The step of the newest evaluation."""
        self.best_step: int | None = None
        """The step of the best evaluation by `checkpoint.best`, the base excluded."""

    @property
    def knows_base(self) -> bool:
        """Whether the base's scores are known."""
        return START in self._means

    def note_base(self, means: Mapping[str, float], scores: Mapping[str, Tensor]) -> None:
        """Record the base's scores as those of step 0, unless they are known or the run started from other adapters."""
        known = self._means.get(START, {})
        if self.starts_as_base and any(name not in known for name in means):
            self._note(START, {**means, **known}, {**scores, **self._scores.get(START, {})})

    def note(self, step: int, means: Mapping[str, float], scores: Mapping[str, Tensor]) -> list[Event]:
        """Record an evaluation; return the events that it triggers by the recipe's rules."""
        self._note(step, means, scores)
        self.newest = step
        needed = {step, START, self.best_step, *self._best.values()}
        self._means = {at: means for at, means in self._means.items() if at in needed}
        self._scores = {at: scores for at, scores in self._scores.items() if at in needed}
        return self.events()

    def _note(self, step: int, means: Mapping[str, float], scores: Mapping[str, Tensor]) -> None:
        self._means[step] = {name: float(value) for name, value in means.items()}
        self._scores[step] = {name: value.detach().cpu() for name, value in scores.items()}
        for name, value in self._means[step].items():
            if name not in self._best or self._gain(name, self._means[self._best[name]][name], value) > 0:
                self._best[name] = step
        if step != START and self.best_by in self._means[step]:
            best = None if self.best_step is None else self._means[self.best_step][self.best_by]
            if best is None or self._gain(self.best_by, best, self._means[step][self.best_by]) > 0:
                self.best_step = step

    def _gain(self, name: str, before: float, now: float) -> float:
        """By how much a score got better."""
        return before - now if name in self.smaller_is_better else now - before

    def best(self) -> dict[str, Any] | None:
        """The best evaluation by `checkpoint.best`, for eval.json: the score's name, step and value, and the base's."""
        if self.best_by is None or self.best_step is None:
            return None
        base = self._means.get(START, {}).get(self.best_by)
        return {
            "by": self.best_by,
            "step": self.best_step,
            "value": self._means[self.best_step][self.best_by],
            "base": base,
        }

    def events(self) -> list[Event]:
        """The events that the newest evaluation triggers."""
        if self.newest is None:
            return []
        return [*self._broken_rules(self.newest), *self._hacked(self.newest)]

    def _broken_rules(self, step: int) -> list[Event]:
        events = []
        for name, falls_by in self.rules.items():
            if name not in self._means[step]:
                continue
            best, now = self._best[name], self._means[step][name]
            fall = self._gain(name, now, self._means[best][name])
            if fall >= falls_by:
                message = (
                    f"step {step}: stop_when: '{name}' fell by {fall:.4g}, {self._from_to(name, best, step)} since "
                    f"{_when(best)} (falls_by: {falls_by:g})"
                )
                events.append(Event(step, "stop_when", name, now, "stop", message))
        return events

    def _hacked(self, step: int) -> list[Event]:
        """Events for held-out rewards that fell below their best while a trained one improved, both beyond chance."""
        events = []
        for name, direction in self.directions.items():
            if direction or self.on_fall == "ignore" or name not in self._scores[step]:
                continue
            best = self._best[name]
            known = self._scores[step].keys() & self._scores[best].keys()
            trained = [other for other, direction in self.directions.items() if direction and other in known]
            improved = [other for other in trained if self._change(other, best, step) == self.directions[other]]
            if self._change(name, best, step) < 0 and improved:
                message = (
                    f"step {step}: held-out reward '{name}' fell {self._from_to(name, best, step)} since "
                    f"{_when(best)}, while '{improved[0]}', which is trained on, went "
                    f"{self._from_to(improved[0], best, step)}: this may be reward hacking"
                )
                events.append(Event(step, "held_out_falls", name, self._means[step][name], self.on_fall, message))
        return events

    def _change(self, name: str, before: int, now: int) -> int:
        """1 or -1 if a reward rose or fell between two steps by more than chance, otherwise 0."""
        return sign_of_mean(self._scores[now][name] - self._scores[before][name])

    def _from_to(self, name: str, before: int, now: int) -> str:
        return f"from {self._means[before][name]:.4g} to {self._means[now][name]:.4g}"

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values only."""
        return {
            "how": self._settings,
            "means": {at: dict(means) for at, means in self._means.items()},
            "scores": {at: dict(scores) for at, scores in self._scores.items()},
            "best": dict(self._best),
            "newest": self.newest,
            "best_by": self.best_by,
            "best_step": self.best_step,
            "comparable_from": self.comparable_from,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Restore a state; return False, and restore nothing, if its evaluations had other settings."""
        if state["how"] != self._settings:
            return False
        self._means = {at: dict(means) for at, means in state["means"].items()}
        self._scores = {at: dict(scores) for at, scores in state["scores"].items()}
        self._best, self.newest = dict(state["best"]), state["newest"]
        self.comparable_from = state.get("comparable_from", START)  # earlier versions' checkpoints have none
        if state["best_by"] == self.best_by:
            self.best_step = state["best_step"]
        return True


def sign_of_mean(differences: Tensor) -> int:
    """The sign of the mean of paired differences [N] if its 95 % interval (Student's) excludes 0, otherwise 0."""
    values = differences.double().numpy()
    if len(values) < 2 or not np.ptp(values):
        return int(np.sign(values.mean()))
    from statsmodels.stats.weightstats import DescrStatsW  # here: it takes seconds, and not every run gets so far

    low, high = DescrStatsW(values).tconfint_mean(alpha=1 - CONFIDENCE)
    return int(low > 0) - int(high < 0)


def _when(step: int) -> str:
    return "the start" if step == START else f"step {step}"


def _settings(recipe: Recipe) -> str:
    """The settings that two evaluations must share to be comparable, as text."""
    if recipe.evaluate is None:
        return ""
    data = recipe.evaluate.model_dump(mode="json") | {"export": recipe.export}
    data |= {"guidance": data["guidance"][0]}
    newer = ["resolution"] if recipe.evaluate.resolution is None else []
    for irrelevant in ("every", "batch_size", "keep_base", *newer):
        data.pop(irrelevant)
    return str(sorted(data.items(), key=lambda item: item[0]))
