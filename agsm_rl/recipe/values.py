"""The values of a recipe's keys that have a form of their own: names, weights, ranges of noise levels, guidances."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from agsm_rl.training.limits import MAX_NUMBER


def _schedule(value: Any) -> Any:
    """Check a weight: a number, or {step: number}, interpolated linearly."""
    points = value if isinstance(value, dict) else {0: value}
    if not points:
        raise ValueError("a weight is a number or a schedule {step: weight}; this schedule is empty")
    for step, weight in points.items():
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_NUMBER:
            raise ValueError(f"a schedule's keys are steps from 0 to {MAX_NUMBER:,}; got {step!r}")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"a weight is a number or a schedule such as {{0: 0.0, 100: 1.0}}; got {weight!r}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"a weight must be finite and at least 0; got {weight}. A weight of 0 disables the term")
    return value


def _range(t: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= t[0] < t[1] <= 1:
        raise ValueError(f"a range of noise levels is [low, high] with 0 <= low < high <= 1; got {list(t)}")
    return t


def _several(value: Any) -> Any:
    """One value as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _plain_name(name: str) -> str:
    """Check a name, which becomes part of file names and of the names of metrics."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"'{name}' is not a valid name; use letters, digits, _ and - only")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
Weight = Annotated[float | dict[int, float], BeforeValidator(_schedule)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
Guidance = Annotated[float, Field(ge=-1e4, le=1e4)]
Guidances = Annotated[list[Guidance], Field(min_length=1), BeforeValidator(_several)]
"""One or several."""
NoiseRange = Annotated[tuple[float, float], AfterValidator(_range)]
