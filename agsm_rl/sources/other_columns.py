"""What the other columns of a prompt's row say, as plain values that can be stored, sent and given to any reward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

LEFT_OUT = object()
"""Stands for what is neither text nor a number: the bytes of a picture or a sound, a decoded image."""


def other_columns(row: Mapping[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """A row without its `used` columns: {column: value} of None, bool, int, float, str, lists and dicts of them.

    Dates become ISO texts, and numbers that are not finite None. Pictures and raw bytes are left out.
    """
    used = set(used)
    plain = {str(name): _plain(value) for name, value in row.items() if name not in used}
    return {name: value for name, value in plain.items() if value is not LEFT_OUT}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return _plain(float(value))
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return other_columns(value, ())
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return LEFT_OUT if any(item is LEFT_OUT for item in items) else items
    import numpy as np  # here, so that the command line need not wait for it

    return _plain(value.tolist()) if isinstance(value, np.generic | np.ndarray) else LEFT_OUT
