"""What a cell's figures depend on, and whether it was finished under that.

The settings of a finished cell are kept in its cell.json, those of its training in trained.json. It is done if they
mean the same as what it would run with now: an option that came in since then does not matter while it has its first
default (recipe/earlier.py); any other difference does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.recipe.earlier import evaluation_of_today, recipe_of_today
from agsm_rl.recipe.parts import Parts


@dataclass(frozen=True)
class Settings:
    """A complete recipe, until when it trains ({steps, seconds}), all evaluations, and which split is reported."""

    recipe: dict[str, Any]
    limit: dict[str, Any]
    evaluations: list[dict[str, Any]]
    reported: str | None

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> Settings:
        """What `to_json` gave, read from a file: there, the steps of a schedule have become texts.

        UserError where it is something else.
        """
        try:
            settings = Settings(**content)
            for term in settings.recipe["objectives"]:
                if isinstance(term["weight"], dict):
                    term["weight"] = {int(step): weight for step, weight in term["weight"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"settings: {type(error).__name__}: {error}") from error
        return settings

    @property
    def fingerprint(self) -> str:
        """Another one for other settings: tells one training of a cell from another."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()


def same_settings(now: Settings, then: Settings, *, allow_imports: Collection[str] = ()) -> bool:
    """Whether a cell that was finished under `then` is finished under `now`."""
    if now == then:
        return True
    if now.reported != then.reported or not same_training(now, then, allow_imports=allow_imports):
        return False
    parts = Parts(where="evaluate", allow_imports=allow_imports)
    try:
        evaluations = [evaluation_of_today(data, parts).model_dump(mode="json") for data in then.evaluations]
    except (UserError, ValueError):  # names an option or a reward that no longer exists
        return False
    return now.evaluations == evaluations


def same_training(now: Settings, then: Settings, *, allow_imports: Collection[str] = ()) -> bool:
    """Whether a cell that was trained under `then` is trained under `now`, however it is evaluated."""
    if now.limit != then.limit:
        return False
    try:
        recipe = recipe_of_today(then.recipe, where="recipe", allow_imports=allow_imports).to_data()
    except UserError:  # names an option or a class that no longer exists
        return False
    return now.recipe | {"evaluate": None} == recipe | {"evaluate": None}
