"""What a prompt asks for in GenEval's form, from the columns of its row, checked.

    {"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?: [{"class", "count"}]}

Tables cannot always hold that as it is: a cell of a csv file holds it as JSON, and parquet fills what a row lacks with
None.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Any

from agsm_rl_rewards.geneval.rules import COLORS, RELATIONS

KEYS = ("tag", "include", "exclude")


def object_names() -> list[str]:
    """COCO's 80 classes in order, under GenEval's names."""
    data = files("agsm_rl_rewards.geneval") / "data" / "object_names.txt"
    return data.read_text(encoding="utf-8").split("\n")[:80]


def requirements(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`tag`, `include` and `exclude` of a prompt's row, without what is None and with JSON cells read."""
    return {key: _without_none(_from_cell(metadata[key])) for key in KEYS if metadata.get(key) not in (None, "")}


def fault(asked: Mapping[str, Any], names: Collection[str]) -> str:
    """What is wrong with a prompt's requirements; "" if nothing is."""
    include, exclude = asked.get("include"), asked.get("exclude", [])
    if not isinstance(asked.get("tag"), str) or not isinstance(include, list) or not include:
        return "has no `tag` or no `include`, which GenEval judges by"
    if not isinstance(exclude, list):
        return f"`exclude` is {exclude!r:.60}, but must be a list"
    for index, wanted in enumerate([*include, *exclude]):
        if (
            not isinstance(wanted, dict)
            or not _is_class(wanted.get("class"), names)
            or not _is_count(wanted.get("count"))
        ):
            return f"{wanted!r:.100} needs a class (one of COCO's 80) and a count"
        if "color" in wanted and wanted["color"] not in COLORS:
            return f"'{wanted['color']}' is not one of GenEval's colours"
        if "position" in wanted and not _is_position(wanted["position"], index):
            return f"{wanted['position']!r:.60} is not a position relative to an earlier object"
    return ""


def classes_by_colour(asked: Mapping[str, Any]) -> set[str]:
    """The classes whose colour the prompt asks for."""
    return {wanted["class"] for wanted in asked.get("include", []) if "color" in wanted}


def _is_class(value: Any, names: Collection[str]) -> bool:
    return isinstance(value, str) and value in names


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_position(value: Any, index: int) -> bool:
    if not isinstance(value, list) or len(value) != 2 or value[0] not in RELATIONS:
        return False
    return isinstance(value[1], int) and not isinstance(value[1], bool) and 0 <= value[1] < index


def _from_cell(value: Any) -> Any:
    """A list that a text holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
