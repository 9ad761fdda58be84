"""Figures as text: shares in percent and points, numbers with the decimals that their interval supports."""

from __future__ import annotations

import math

from agsm_rl.evaluate.intervals import Interval
from agsm_rl.report.eval_rows import Score

DIGITS = 4
"""Of a number without an interval."""


def value_text(score: Score, part: Interval) -> str:
    """45.0 % [40.1, 49.9], or 0.251 [0.240, 0.262]"""
    if score.share:
        return f"{100 * part.value:.1f} % [{100 * part.low:.1f}, {100 * part.high:.1f}]"
    value, low, high = (number(one, decimals_of(part)) for one in (part.value, part.low, part.high))
    return value + _bounds(low, high)


def change_text(score: Score, part: Interval) -> str:
    """+4.5 [+1.2, +7.8] in points, or +0.012 [+0.001, +0.023]"""
    if score.share:
        return f"{signed(part.value)} [{signed(part.low)}, {signed(part.high)}]"
    value, low, high = (number(one, decimals_of(part), "+") for one in (part.value, part.low, part.high))
    return value + _bounds(low, high)


def signed(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    rounded = round(round(100 * value, 9), 1) + 0.0  # the same on every machine; no −0.0
    return f"{rounded:+.1f}".replace("-", "−")


def decimals_of(part: Interval) -> int | None:
    """So many that the interval's width has two digits; None where there is no width to go by."""
    width = part.high - part.low
    if not math.isfinite(width) or width <= 0:
        return None
    return min(12, max(0, 1 - math.floor(math.log10(width))))


def number(value: float, decimals: int | None = None, sign: str = "") -> str:
    """A number with so many decimals, or in four digits; nothing for one that is not there."""
    if not math.isfinite(value):
        return ""
    if decimals is None:
        return f"{float(f'{value:.{DIGITS}g}') + 0.0:{sign}.{DIGITS}g}".replace("-", "−")
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}".replace("-", "−")


def _bounds(low: str, high: str) -> str:
    return f" [{low}, {high}]" if low and high else ""
