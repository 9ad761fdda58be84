"""The figures of a run that a person watches: losses, and the newest value of every single reward."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from agsm_rl.trainer import Trainer

SPEED_OVER = 20
"""Steps over which the time of a step is averaged, at most."""


@dataclass
class _Loss:
    newest: float = math.nan
    sum: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.newest, self.sum, self.count = value, self.sum + value, self.count + 1

    @property
    def mean(self) -> float:
        """Over the steps since the last `reset`; the newest value where there were none."""
        return self.sum / self.count if self.count else self.newest

    def reset(self) -> None:
        self.sum, self.count = 0.0, 0


@dataclass
class _Score:
    value: float
    step: int


@dataclass
class NewestFigures:
    """Losses and rewards by the names they are shown under, from the metrics of each step.

    A term that is not due keeps its newest values. Terms that learn from the same source share its rewards, which are
    shown once: as `reward/<name>`, or `<source>: reward/<name>` where several sources have a reward of that name.
    """

    losses: dict[str, _Loss] = field(default_factory=dict)
    scores: dict[tuple[str, str], _Score] = field(default_factory=dict)
    step: int = 0
    _seconds: list[float] = field(default_factory=list)

    def note(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Take in a step's metrics."""
        self.step = step
        self._seconds = [*self._seconds, metrics.get("seconds", math.nan)][-SPEED_OVER:]
        names = {id(source): name.removeprefix("sources.") for name, source in trainer.sources.items()}
        learned = 0
        for term in trainer.terms:
            if f"{term.name}/loss" in metrics:
                learned += 1
                self.losses.setdefault(f"{term.name}/loss", _Loss()).add(metrics[f"{term.name}/loss"])
            of_source = term.source.metrics()
            for name, value in metrics.items():
                key = name.removeprefix(f"{term.name}/")
                if key != name and (key == "reward" or key.startswith("reward/")):
                    giver = names[id(term.source)] if key in of_source else term.name
                    self.scores[giver, key] = _Score(value, step)
        if learned and len(trainer.terms) > 1:
            self.losses.setdefault("loss", _Loss()).add(metrics["loss"])

    def reset(self) -> None:
        """Begin the losses' means anew."""
        for loss in self.losses.values():
            loss.reset()

    @property
    def seconds(self) -> float:
        """Mean time of the newest steps."""
        return sum(self._seconds) / len(self._seconds) if self._seconds else math.nan

    def shown_losses(self, *, averaged: bool) -> list[str]:
        """Each loss with its name, the total first."""
        names = sorted(self.losses, key=lambda name: name != "loss")
        return [f"{name} {_short(self.losses[name].mean if averaged else self.losses[name].newest)}" for name in names]

    def shown_rewards(self) -> list[str]:
        """Each single reward with its name; after a source's, their step if that is not the newest."""
        keys = [key for _, key in self.scores]
        parts = []
        for giver in dict.fromkeys(giver for giver, _ in self.scores):
            scores = {key: score for (other, key), score in self.scores.items() if other == giver}
            total = scores.pop("reward", None)
            if total is not None and len(scores) != 1:  # with one reward, it is the same again, times its weight
                scores["reward"] = total
            for key, score in scores.items():
                name = "reward (weighted sum)" if key == "reward" else key
                parts.append(f"{name if keys.count(key) == 1 else f'{giver}: {name}'} {_short(score.value)}")
            if scores and (step := max(score.step for score in scores.values())) < self.step:
                parts.append(f"(of step {step})")
        return parts


def _short(value: float) -> str:
    return f"{value:.4g}"
