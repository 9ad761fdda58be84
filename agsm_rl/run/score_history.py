"""What evaluations say of a run as it goes on: the best one so far, and whether a score has fallen too far from it.

All evaluations of a run are on the same prompts and noise, so that two of them are compared image by image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from statsmodels.stats.weightstats import DescrStatsW
from torch import Tensor

from agsm_rl.evaluate.intervals import CONFIDENCE
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.rewards import directions
from agsm_rl.training.anomalies import Event

START = 0
"""The step under which the base stands: the model with which a run begins, unless it starts from other adapters."""


class Standing:
    """Scores of the evaluations that matter: of the best one by each score, of the base, and of the newest.

    Of each evaluation the mean of every score is kept, and the scores [N] of each reward, an image each.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.best_by = recipe.checkpoint.best
        self.rules = {name: rule.falls_by for name, rule in recipe.stop_when.items()}
        self.on_fall = recipe.watch.held_out_falls
        self.directions = directions(recipe)
        self._how = _how(recipe)
        self._starts_as_base = recipe.start_from is None
        self._means: dict[int, dict[str, float]] = {}
        self._scores: dict[int, dict[str, Tensor]] = {}
        self._best: dict[str, int] = {}
        self.newest: int | None = None
        """The step of the newest evaluation."""
        self.best_step: int | None = None
        """The step of the best by `checkpoint.best` among those that were trained."""

    @property
    def knows_base(self) -> bool:
        """Whether the base's scores are there already."""
        return START in self._means

    def note_base(self, means: Mapping[str, float], scores: Mapping[str, Tensor]) -> None:
        """Take the base's scores for those of the run's beginning, unless it began with other adapters."""
        if self._starts_as_base and not self.knows_base:
            self._note(START, means, scores)

    def note(self, step: int, means: Mapping[str, float], scores: Mapping[str, Tensor]) -> list[Event]:
        """Take in an evaluation; what it says against going on, as the recipe's rules have it."""
        self._note(step, means, scores)
        self.newest = step
        needed = {step, START, self.best_step, *self._best.values()}
        self._means = {at: found for at, found in self._means.items() if at in needed}
        self._scores = {at: found for at, found in self._scores.items() if at in needed}
        return self.verdict()

    def _note(self, step: int, means: Mapping[str, float], scores: Mapping[str, Tensor]) -> None:
        self._means[step] = {name: float(value) for name, value in means.items()}
        self._scores[step] = {name: value.detach().cpu() for name, value in scores.items()}
        for name, value in self._means[step].items():
            if name not in self._best or value > self._means[self._best[name]][name]:
                self._best[name] = step
        if step != START and self.best_by in self._means[step]:
            kept = None if self.best_step is None else self._means[self.best_step][self.best_by]
            if kept is None or self._means[step][self.best_by] > kept:
                self.best_step = step

    def best(self) -> dict[str, Any] | None:
        """The best by `checkpoint.best`, for eval.json: which, when, how good, and how good the base was."""
        if self.best_by is None or self.best_step is None:
            return None
        base = self._means.get(START, {}).get(self.best_by)
        return {
            "by": self.best_by,
            "step": self.best_step,
            "value": self._means[self.best_step][self.best_by],
            "base": base,
        }

    def verdict(self) -> list[Event]:
        """What the newest evaluation says against going on."""
        if self.newest is None:
            return []
        return [*self._broken_rules(self.newest), *self._hacked(self.newest)]

    def _broken_rules(self, step: int) -> list[Event]:
        found = []
        for name, falls_by in self.rules.items():
            best, now = self._best[name], self._means[step][name]
            fall = self._means[best][name] - now
            if fall >= falls_by:
                words = (
                    f"step {step}: stop_when: '{name}' fell by {fall:.4g}, {self._from_to(name, best, step)} since "
                    f"{_when(best)} (falls_by: {falls_by:g})"
                )
                found.append(Event(step, "stop_when", name, now, "stop", words))
        return found

    def _hacked(self, step: int) -> list[Event]:
        """Held-out rewards that fell from their best while a trained one rose, each by more than chance."""
        found = []
        for name, direction in self.directions.items():
            if direction or self.on_fall == "ignore" or name not in self._best:
                continue
            best = self._best[name]
            others = [other for other, trained in self.directions.items() if trained]
            risen = [other for other in others if self._change(other, best, step) == self.directions[other]]
            if self._change(name, best, step) < 0 and risen:
                told = f"'{risen[0]}', which is trained on, went {self._from_to(risen[0], best, step)}"
                words = (
                    f"step {step}: held-out reward '{name}' fell {self._from_to(name, best, step)} since "
                    f"{_when(best)}, while {told}: the trained reward may be being hacked"
                )
                found.append(Event(step, "held_out_falls", name, self._means[step][name], self.on_fall, words))
        return found

    def _change(self, name: str, before: int, now: int) -> int:
        """1 or -1 where a reward rose or fell from one step to another by more than chance, else 0."""
        return sign_of_mean(self._scores[now][name] - self._scores[before][name])

    def _from_to(self, name: str, before: int, now: int) -> str:
        return f"from {self._means[before][name]:.4g} to {self._means[now][name]:.4g}"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "how": self._how,
            "means": {at: dict(means) for at, means in self._means.items()},
            "scores": {at: dict(scores) for at, scores in self._scores.items()},
            "best": dict(self._best),
            "newest": self.newest,
            "best_by": self.best_by,
            "best_step": self.best_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue where `state_dict` was taken; False, and nothing taken, when it was measured in another way."""
        if state["how"] != self._how:
            return False
        self._means = {at: dict(means) for at, means in state["means"].items()}
        self._scores = {at: dict(scores) for at, scores in state["scores"].items()}
        self._best, self.newest = dict(state["best"]), state["newest"]
        if state["best_by"] == self.best_by:
            self.best_step = state["best_step"]
        return True


def sign_of_mean(differences: Tensor) -> int:
    """1 or -1 where the mean of paired differences [N] is above or below 0 by its 95 % interval (Student's), else 0."""
    values = differences.double().numpy()
    if len(values) < 2 or not np.ptp(values):
        return int(np.sign(values.mean()))
    low, high = DescrStatsW(values).tconfint_mean(alpha=1 - CONFIDENCE)
    return int(low > 0) - int(high < 0)


def _when(step: int) -> str:
    return "the start" if step == START else f"step {step}"


def _how(recipe: Recipe) -> str:
    """What two evaluations must share to be comparable, as text."""
    if recipe.evaluate is None:
        return ""
    data = recipe.evaluate.model_dump(mode="json") | {"export": recipe.export}
    data |= {"guidance": data["guidance"][0]}
    for free in ("every", "batch_size"):
        data.pop(free)
    return str(sorted(data.items(), key=lambda item: item[0]))
