"""What an evaluation says as figures alone: of suites that keep nothing per image, and of any suite not known here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Bounds = tuple[float, float | None, float | None]
"""A value with its interval, as a file has it; None where the file has no bound."""


@dataclass(frozen=True)
class Figure:
    """One figure of one model, as its file gives it: nothing about it is estimated here."""

    name: str
    guidance: float
    value: Bounds
    base: Bounds | None = None
    change: Bounds | None = None


def figures_of(entry: Mapping[str, Any], guidance: float) -> list[Figure]:
    """The overall figure, each tag's and each reward's, with the base's and the difference where they are there."""
    base, difference = _block(entry, "base"), _block(entry, "difference")
    overall = _bounds(entry, "overall")
    found = (
        [Figure("overall", guidance, overall, _bounds(base, "overall"), _change(difference, "overall"))]
        if overall
        else []
    )
    for kind, key in (("tags", "score"), ("rewards", "value")):
        theirs, changes = _block(base, kind), _block(difference, kind)
        for name, row in _block(entry, kind).items():
            value = _bounds(row, key)
            if value is not None:
                found.append(Figure(str(name), guidance, value, _bounds(theirs.get(name), key), _change(changes, name)))
    return found


def _change(differences: Mapping[str, Any], name: Any) -> Bounds | None:
    return _bounds(differences.get(name), "value")


def _bounds(row: Any, key: str) -> Bounds | None:
    """A number by itself, or under `key` beside `low` and `high`; None for anything else."""
    if not isinstance(row, Mapping):
        value = _number(row)
        return None if value is None else (value, None, None)
    value = _number(row.get(key))
    return None if value is None else (value, _number(row.get("low")), _number(row.get("high")))


def _block(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = entry.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float | None:
    """A finite number, else None: nothing else can be shown."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
