"""The settings that a cell's figures depend on, and whether the cell was finished with them.

The settings of a finished cell are in its cell.json, those of its training in trained.json. The cell is done if they
mean the same as the settings it would run with now: an option that was added since does not matter while it has its
first default (recipe/earlier.py); any other difference does.
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
    """A complete recipe, the limit of its training ({steps, seconds}), all evaluations, and the reported split."""

    recipe: dict[str, Any]
    limit: dict[str, Any]
    evaluations: list[dict[str, Any]]
    reported: str | None

    def to_json(self) -> dict[str, Any]:
        """The settings as they are written to a file."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> Settings:
        """The settings that `to_json` wrote. JSON has turned the steps of a schedule into strings; this undoes it.

        UserError if the content is something else.
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
        """A hash of the settings, which distinguishes one training of a cell from another."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()


def limit_of(recipe: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """The limit of a training."""
    return {"steps": recipe["steps"], "seconds": seconds}


def same_settings(now: Settings, then: Settings, *, allow_imports: Collection[str] = ()) -> bool:
    """Whether a cell that was finished with the settings `then` counts as finished with `now`."""
    if now == then:
        return True
    if now.reported != then.reported or not same_training(now, then, allow_imports=allow_imports):
        return False
    parts = Parts(where="evaluate", allow_imports=allow_imports)
    try:
        evaluations = [evaluation_of_today(data, parts).model_dump(mode="json") for data in then.evaluations]
    except (UserError, ValueError):  # names an option or a reward that no longer exists
        return False
    return [what_it_measures(data) for data in now.evaluations] == [what_it_measures(data) for data in evaluations]


def what_it_measures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's section without the keys that say only how its figures come about."""
    return {key: value for key, value in evaluation.items() if key not in ("batch_size", "keep_base")}


def same_training(now: Settings, then: Settings, *, allow_imports: Collection[str] = ()) -> bool:
    """Whether a cell that was trained with the settings `then` counts as trained with `now`, evaluations aside."""
    if now.limit != then.limit:
        return False
    try:
        recipe = recipe_of_today(then.recipe, where="recipe", allow_imports=allow_imports).to_data()
    except UserError:  # names an option or a class that no longer exists
        return False
    return now.recipe | {"evaluate": None} == recipe | {"evaluate": None}
