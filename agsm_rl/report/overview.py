"""Every score of every suite in one table, and what evaluations hold as single figures, which cannot be paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agsm_rl.evaluate.intervals import Interval
from agsm_rl.report.eval_file import NOT_RECORDED
from agsm_rl.report.eval_rows import VERDICTS, Score
from agsm_rl.report.figures import Bounds, Figure
from agsm_rl.report.findings import Findings
from agsm_rl.report.load import Loaded
from agsm_rl.report.runs import Run
from agsm_rl.report.texts import change_text, decimals_of, number, value_text
from agsm_rl.report.views import BASE, OWN, GuidanceView


@dataclass(frozen=True)
class Cell:
    """What a model reaches, and under it what that is minus the base; `clear` if its interval does not cross 0."""

    value: str
    change: str = ""
    clear: bool = False


@dataclass(frozen=True)
class Row:
    """One score: what it is, at which guidance, the base's figure and each variant's."""

    suite: str
    score: str
    guidance: str
    base: str
    cells: tuple[Cell | None, ...]


Suites = Mapping[str, tuple[Loaded, Sequence[GuidanceView], Findings]]


def overview(loaded: Loaded, suites: Suites) -> list[Row]:
    """The rows; none where they would repeat what the page opens with."""
    variants = [variant.name for variant in loaded.all_variants]
    rows = [row for name, suite in suites.items() for row in _estimated(name, *suite, variants)]
    rows += _as_in_the_files(loaded.figures, variants)
    is_told = len(suites) == 1 and {row.score for row in rows} <= set(VERDICTS.values())
    return [] if is_told or (suites and len(rows) == 1) else rows


def _estimated(
    name: str, loaded: Loaded, views: Sequence[GuidanceView], found: Findings, variants: Sequence[str]
) -> list[Row]:
    """A suite's scores, each at the guidance that the page opens with."""
    view, rows = views[0], []
    for key, score in loaded.evaluation.scores.items():
        base = value_text(score, found.score(key, view, BASE).overall) if BASE in view.guidance else ""
        cells = tuple(_cell(key, score, view, found, one) if one in view.guidance else None for one in variants)
        rows.append(Row(name, score.label, _guidance(view), base, cells))
    return rows


def _cell(key: str, score: Score, view: GuidanceView, found: Findings, variant: str) -> Cell:
    value = value_text(score, found.score(key, view, variant).overall)
    change = found.difference(key, view, variant)
    if change is None:
        return Cell(value)
    return Cell(value, change_text(score, change.overall), change.overall.excludes_zero)


def _guidance(view: GuidanceView) -> str:
    if view.key == OWN:
        return "each its own"
    return _told(next(iter(view.guidance.values())))


def _told(guidance: float) -> str:
    return "not recorded" if guidance == NOT_RECORDED else f"{guidance:g}"


def _as_in_the_files(figures: Sequence[tuple[Run, str, Figure]], variants: Sequence[str]) -> list[Row]:
    """A row per figure; of a variant with several runs, the mean of theirs without an interval."""
    groups: dict[tuple[str, str, float], list[tuple[Run, Figure]]] = {}
    for run, suite, figure in figures:
        groups.setdefault((suite, figure.name, figure.guidance), []).append((run, figure))
    rows = []
    for (suite, name, guidance), members in groups.items():
        base = next((figure.base for _, figure in members if figure.base is not None), None)
        cells = tuple(_joined([figure for run, figure in members if run.variant == one]) for one in variants)
        rows.append(Row(suite, name, _told(guidance), "" if base is None else _text(base), cells))
    return rows


def _joined(figures: Sequence[Figure]) -> Cell | None:
    if not figures:
        return None
    if len(figures) > 1:
        changes = [figure.value[0] - figure.base[0] for figure in figures if figure.base is not None]
        mean = number(float(np.mean([figure.value[0] for figure in figures])))
        return Cell(mean, number(float(np.mean(changes)), sign="+") if changes else "")
    (figure,) = figures
    change = figure.change
    if change is None and figure.base is not None:
        change = (figure.value[0] - figure.base[0], None, None)
    value = _text(figure.value)
    return Cell(value) if change is None else Cell(value, _text(change, "+"), _interval(change).excludes_zero)


def _text(part: Bounds, sign: str = "") -> str:
    value, low, high = part
    decimals = decimals_of(_interval(part))
    bounds = "" if low is None or high is None else f" [{number(low, decimals, sign)}, {number(high, decimals, sign)}]"
    return number(value, decimals, sign) + bounds


def _interval(part: Bounds) -> Interval:
    """The same with NaN for a bound that is not there."""
    value, low, high = part
    return Interval(value, np.nan if low is None else low, np.nan if high is None else high)
