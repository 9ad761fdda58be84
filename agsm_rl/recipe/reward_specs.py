"""Rewards that are measured, not learned from: their names, options and the means to make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agsm_rl.errors import UserError
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.rewards import RewardEntry

if TYPE_CHECKING:
    from agsm_rl.interfaces import Reward


@dataclass(frozen=True)
class RewardSpec:
    """A reward that a suite measures.

    Attributes:
        name: Its registered name.
        options: The options that were given.
        weight: Its weight in the suite's `overall`.
        complete: All its options, with their defaults.
        key: Its name in a recipe; None on the command line.
        parts: Makes it, within what the command line allows.
        place: Where it was given, for messages.
    """

    name: str
    options: Mapping[str, Any]
    weight: float
    complete: Mapping[str, Any]
    key: str | None = None
    parts: Parts = field(default_factory=lambda: Parts(where="rewards"), compare=False)
    place: str = ""

    @property
    def label(self) -> str:
        """Its key; without one, hpsv2, or hpsv2:version=2.1 if there are options."""
        if self.key is not None:
            return self.key
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def make(self) -> Reward:
        """The reward; UserError where its constructor or the command line refuses it."""
        reward: Reward = self.parts.reward(self.name, self.place or self.label, dict(self.complete))
        return reward


def spec_of(entry: RewardEntry, parts: Parts, place: str) -> RewardSpec:
    """The spec of a completed entry of a recipe."""
    if entry.normalise != "raw":
        raise UserError(f"{parts.at(place)}: 'normalise' has no effect here, because rewards are only measured")
    return RewardSpec(entry.use, entry.options, entry.weight, entry.options, key=entry.name, parts=parts, place=place)
