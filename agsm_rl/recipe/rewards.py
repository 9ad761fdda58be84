"""Rewards in a recipe: in the `rewards` of a source or objective, and in `evaluate.rewards`.

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


@dataclass(frozen=True)
class RewardEntry:
    """The reward under `key` in a recipe. `use` is its registered name, `options` are its constructor's arguments."""

    key: str
    use: str
    weight: float = 1.0
    normalise: Literal["raw", "z_score"] = "raw"
    options: dict[str, Any] = field(default_factory=dict)
    own_keys: tuple[str, ...] = ("use", "weight", "normalise")

    @property
    def name(self) -> str:
        """The reward's name in metrics: its key, or the function's name for `module:function`."""
        return self.key.rpartition(":")[2]

    def to_data(self) -> float | dict[str, Any]:
        """The entry as plain data for a recipe; a number if there is only a weight."""
        data: dict[str, Any] = {} if self.use == self.key else {"use": self.use}
        data |= {"weight": self.weight} if "weight" in self.own_keys else {}
        data |= {} if self.normalise == "raw" else {"normalise": self.normalise}
        data |= self.options
        return self.weight if data == {"weight": self.weight} else data


def in_source(rewards: Mapping[str, Any]) -> list[RewardEntry]:
    """The entries of the `rewards` of a source or objective, {name: weight} or {name: {use, weight, …}}."""
    entries = []
    for key, value in rewards.items():
        given = RewardOptions.model_validate(value if isinstance(value, Mapping) else {"weight": float(value)})
        entries.append(
            RewardEntry(key, _use(key, given.use), given.weight, given.normalise, options=dict(given.model_extra or {}))
        )
    _check_names(entries)
    return entries


def in_evaluation(rewards: list[str] | Mapping[str, Any]) -> list[RewardEntry]:
    """The entries of `evaluate.rewards`, a list of names or {name: {use, options…}}, without weights."""
    given = dict(rewards) if isinstance(rewards, Mapping) else dict.fromkeys(rewards)
    if len(given) < len(rewards):
        raise UserError("rewards: a reward is listed twice")
    entries = []
    for key, value in given.items():
        options = dict(value or {})
        for extra in ("weight", "normalise"):
            if extra in options:
                raise UserError(f"rewards.{key}: '{extra}' has no effect here, because rewards are only measured")
        use = _use(key, options.pop("use", None))
        entries.append(RewardEntry(key, use, options=options, own_keys=("use",)))
    _check_names(entries)
    return entries


def trained_on(recipe: RecipeKeys) -> list[RewardEntry]:
    """The rewards that the terms of a completed recipe learn from; those of weight 0 are only logged."""
    used = [block for term in recipe.objectives for block in (term, _source(recipe, term.source))]
    entries = [entry for block in used for entry in in_source(block.options.get("rewards", {}))]
    return [entry for entry in entries if entry.weight]


def directions(recipe: RecipeKeys) -> dict[str, int]:
    """Each evaluated reward's full name → 1 or -1 if a term learns to raise or lower it, 0 if it is held out.

    A reward that a term learns from with other options is held out, too. The full name is `suite/reward`; without
    `evaluate.suites`, the reward's own.
    """
    if recipe.evaluate is None:
        return {}
    trained = trained_on(recipe)
    directions = {}
    for name, block in recipe.evaluate.blocks.items():
        for entry in in_evaluation(block.rewards):
            same = [reward.weight for reward in trained if (reward.use, reward.options) == (entry.use, entry.options)]
            key = entry.name if recipe.evaluate.suites is None else f"{name}/{entry.name}"
            directions[key] = 0 if not same else 1 if same[0] > 0 else -1
    return directions


def _source(recipe: RecipeKeys, source: str | Block) -> Block:
    return recipe.sources[source] if isinstance(source, str) else source


def _use(key: str, use: str | None) -> str:
    if use is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", key):
        raise UserError(f"rewards: '{key}' is not a valid name; use letters, digits, _ and - only")
    return key if use is None else use


def _check_names(entries: list[RewardEntry]) -> None:
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise UserError(
                f"rewards: two would be called '{entry.name}'; rename one, as in {{mine: {{use: '{entry.use}'}}}}"
            )
