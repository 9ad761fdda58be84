"""Rewards as a recipe names them: in a source's or an objective's `rewards`, and in `evaluate.rewards`.

rewards: {shapes: 1.0, small: {use: jpeg_compressibility, weight: 0.1, normalise: z_score}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agsm_rl.errors import UserError
from agsm_rl.recipe.options import RewardOptions
from agsm_rl.recipe.schema import Block, RecipeKeys

SCORES = ("overall", "strict")
"""What a suite measures by itself, by names that no evaluated reward may have."""


@dataclass(frozen=True)
class RewardEntry:
    """A reward that stands under `key`; `use` is the registered one, `options` its constructor's arguments."""

    key: str
    use: str
    weight: float = 1.0
    normalise: Literal["raw", "z_score"] = "raw"
    options: dict[str, Any] = field(default_factory=dict)
    own_keys: tuple[str, ...] = ("use", "weight", "normalise")

    @property
    def name(self) -> str:
        """What the reward is called in metrics: its key; of `module:function`, the function's name."""
        return self.key.rpartition(":")[2]

    def to_data(self) -> float | dict[str, Any]:
        """As a recipe writes it; a number where there is nothing but a weight."""
        said: dict[str, Any] = {} if self.use == self.key else {"use": self.use}
        said |= {"weight": self.weight} if "weight" in self.own_keys else {}
        said |= {} if self.normalise == "raw" else {"normalise": self.normalise}
        said |= self.options
        return self.weight if said == {"weight": self.weight} else said


def in_source(rewards: Mapping[str, Any]) -> list[RewardEntry]:
    """The entries of a source's or an objective's `rewards`, {name: weight} or {name: {use, weight, …}}."""
    found = []
    for key, value in rewards.items():
        said = RewardOptions.model_validate(value if isinstance(value, Mapping) else {"weight": float(value)})
        found.append(
            RewardEntry(key, _use(key, said.use), said.weight, said.normalise, options=dict(said.model_extra or {}))
        )
    _check_names(found)
    return found


def in_evaluation(rewards: list[str] | Mapping[str, Any]) -> list[RewardEntry]:
    """The entries of `evaluate.rewards`, a list of names or {name: {use, options…}}; they have no weight."""
    given = dict(rewards) if isinstance(rewards, Mapping) else dict.fromkeys(rewards)
    if len(given) < len(rewards):
        raise UserError("rewards: a reward stands in it twice")
    found = []
    for key, value in given.items():
        said = dict(value or {})
        for extra in ("weight", "normalise"):
            if extra in said:
                raise UserError(f"rewards.{key}: '{extra}' means nothing here, where rewards are only measured")
        use = _use(key, said.pop("use", None))
        found.append(RewardEntry(key, use, options=said, own_keys=("use",)))
        if key in SCORES:
            raise UserError(f"rewards.{key}: that is the name of a suite's score; give it another, with `use: {use}`")
    _check_names(found)
    return found


def trained_on(recipe: RecipeKeys) -> list[RewardEntry]:
    """The rewards that the terms of a completed recipe learn from (weight 0 is only looked at)."""
    used = [block for term in recipe.objectives for block in (term, _source(recipe, term.source))]
    entries = [entry for block in used for entry in in_source(block.options.get("rewards", {}))]
    return [entry for entry in entries if entry.weight]


def directions(recipe: RecipeKeys) -> dict[str, int]:
    """Each evaluated reward's name → 1 or -1 where a term learns to raise or to lower it, 0 where it is held out.

    Held out is also a reward that is learned from with other options.
    """
    if recipe.evaluate is None:
        return {}
    trained = trained_on(recipe)
    found = {}
    for entry in in_evaluation(recipe.evaluate.rewards):
        weights = [one.weight for one in trained if (one.use, one.options) == (entry.use, entry.options)]
        found[entry.name] = 0 if not weights else 1 if weights[0] > 0 else -1
    return found


def _source(recipe: RecipeKeys, source: str | Block) -> Block:
    return recipe.sources[source] if isinstance(source, str) else source


def _use(key: str, use: str | None) -> str:
    if use is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", key):
        raise UserError(f"rewards: '{key}' cannot be a name; use letters, digits, _ and - only")
    return key if use is None else use


def _check_names(entries: list[RewardEntry]) -> None:
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise UserError(
                f"rewards: two would be called '{entry.name}'; give one a name of its own, as in "
                f"{{mine: {{use: '{entry.use}'}}}}"
            )
