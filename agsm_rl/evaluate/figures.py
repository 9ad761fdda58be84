"""A suite's figures as JSON and as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from agsm_rl.evaluate.intervals import Interval
from agsm_rl.run.screen import styled


@dataclass(frozen=True)
class Scores:
    """Shares of correct images: per tag with Wilson intervals and counts, and the mean over tags."""

    overall: Interval
    tags: dict[str, Interval]
    counts: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """`overall` with its interval, and `tags` as {tag: {correct, total, score, low, high}}."""
        rows = {}
        for tag, share in self.tags.items():
            correct, total = self.counts[tag]
            figures = {"score": share.value, "low": share.low, "high": share.high}
            rows[tag] = {"correct": correct, "total": total, **figures}
        return {"overall": self.overall.value, "low": self.overall.low, "high": self.overall.high, "tags": rows}


def interval_json(part: Interval) -> dict[str, float | None]:
    """score, low and high; an undefined bound is null."""
    return {"score": part.value, "low": _or_null(part.low), "high": _or_null(part.high)}


def change_json(part: Interval) -> dict[str, float | None]:
    """value, low and high of a difference; an undefined bound is null."""
    return {"value": part.value, "low": _or_null(part.low), "high": _or_null(part.high)}


def plain_table(title: str, columns: Sequence[str]) -> Table:
    """A table that fits 80 columns; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def share_table(
    title: str,
    scores: Sequence[Scores],
    changes: tuple[Interval, dict[str, Interval]] | None = None,
    labels: tuple[str, str] = ("other", "this"),
) -> Table:
    """Shares in percent, one row per tag and one for their mean; for two targets, also their difference."""
    columns = (*labels, "difference") if changes else ("score",)
    table = plain_table(title, ("tag", "n", *columns))
    for tag, (_, total) in scores[-1].counts.items():
        cells = [percent(part.tags[tag]) for part in scores] + ([percent(changes[1][tag], "+")] if changes else [])
        table.add_row(styled(tag), str(total), *cells)
    table.add_section()
    total = sum(count for _, count in scores[-1].counts.values())
    cells = [percent(part.overall) for part in scores] + ([percent(changes[0], "+")] if changes else [])
    table.add_row("mean", str(total), *cells, style="bold")
    return table


def percent(part: Interval, sign: str = "") -> str:
    """45.0 [40.1 49.9]"""
    return f"{100 * part.value:{sign}.1f} [{100 * part.low:{sign}.1f} {100 * part.high:{sign}.1f}]"


def number(part: Interval, sign: str = "") -> str:
    """0.2513 [0.2401 0.2622]"""
    if math.isnan(part.low):
        return f"{part.value:{sign}.4g}"
    return f"{part.value:{sign}.4g} [{part.low:{sign}.4g} {part.high:{sign}.4g}]"


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
