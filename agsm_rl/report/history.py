"""metrics.jsonl and evaluations.jsonl as curves, thinned to what a screen shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agsm_rl.errors import UserError
from agsm_rl.files import check_regular, parse_json
from agsm_rl.report.eval_file import EvalFile
from agsm_rl.report.runs import Run
from agsm_rl.run.folder import RunFolder

MOST_POINTS, FEWEST_POINTS, ALL_POINTS = 240, 60, 4000
"""Points per curve, and (roughly) per metric over all runs' curves."""
DETAILED = 8
"""Up to this many runs show all their metrics; more show losses, rewards, gradient norms and cosines."""
OWN_AXES = ("step", "seconds", "images")
EDGE = 0.1
"""Share of a run's draws that represents its beginning and its end."""

MAX_LINE, MAX_STEP = 2**24, 2**53
"""Bytes of a line; steps that a number in the page's scripts can hold."""
MAX_NUMBER = 1e100
"""Sums of figures below this stay finite."""

Row = dict[str, Any]


def curves(run: Run, *, runs: int) -> dict[str, Any]:
    """A run's metrics: means over bins of steps, with steps, seconds and images so far at each bin's end.

    `runs` is the number of runs on the page. An axis that the file does not have is null.
    """
    rows = _metrics(run)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in OWN_AXES))
    if runs > DETAILED:
        names = [name for name in names if _is_main(name)]
    points = max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // runs))
    bins = np.array_split(np.arange(len(rows)), min(len(rows), points)) if rows else []
    ends = [int(part[-1]) for part in bins]
    metrics = {}
    for name in names:
        values = np.array([_number(row.get(name)) for row in rows])
        means = [_mean(values[part]) for part in bins]
        if any(value is not None for value in means):
            metrics[name] = means
    return {
        "step": [rows[end]["step"] for end in ends],
        "seconds": _axis(rows, ends, "seconds", summed=True),
        "images": _axis(rows, ends, "images", summed=False),
        "metrics": metrics,
    }


def evaluations(run: Run, suite: str) -> list[Row]:
    """A suite's scores, and the rewards measured beside it, over steps; the base as step 0, by guidance."""
    of = run.of(suite).evaluation
    last = of.step if of.step is not None else int(run.recipe.get("steps", 0))
    found: dict[tuple[float, int], Row] = {}
    for row in read_rows(RunFolder(run.path).evaluations) if run.file is None else []:
        guidance, step = _number(row.get("guidance")), row["step"]
        # Before there were several suites, a line did not name its own, which was shapes.
        is_its = row["suite"] == suite if "suite" in row else of.suite == "shapes" and of.first_of_run
        if is_its and guidance in of.trained:
            rewards = {name.removeprefix("reward/"): _or_none(row[name]) for name in row if name.startswith("reward/")}
            scores = {name: _or_none(row.get(_logged(name), row.get(f"reward/{name}"))) for name in of.scores}
            found[guidance, step] = scores | {"rewards": _numbers_of(scores, of) | rewards}
    for guidance in of.trained:
        for step, judged in ((0, of.base.get(guidance)), (last, of.trained[guidance])):
            if judged is not None:
                scores = {name: _short(of.score(judged, name)) for name in of.scores}
                found[guidance, step] = scores | {"rewards": _numbers_of(scores, of) | judged.rewards}
    return [{"guidance": guidance, "step": step} | row for (guidance, step), row in sorted(found.items())]


def _numbers_of(scores: Mapping[str, Any], of: EvalFile) -> dict[str, Any]:
    """Those that are rewards and not shares of right images."""
    return {name: value for name, value in scores.items() if not of.scores[name].share}


def _logged(score: str) -> str:
    """A score's name in evaluations.jsonl, where the lenient verdict is the suite's overall figure."""
    return "overall" if score == "correct" else score


def trained_rewards(run: Run) -> dict[str, tuple[float, float]]:
    """Each reward that is learned from, by its name: its mean over the first and over the last tenth of the steps."""
    weightless = _weightless(run.recipe)
    found: dict[str, list[float]] = {}
    source: dict[str, str] = {}
    for row in _metrics(run):
        for name, value in row.items():
            term, middle, reward = name.partition("/reward/")
            # Terms that share a source log the same rewards: the first one's are enough.
            if middle and source.setdefault(reward, term) == term and not math.isnan(number := _number(value)):
                found.setdefault(reward, []).append(number)
    ends = {}
    for reward, values in found.items():
        edge = max(1, round(EDGE * len(values)))
        ends[reward] = (float(np.mean(values[:edge])), float(np.mean(values[-edge:])))
    return {reward: both for reward, both in ends.items() if reward not in weightless}


def _metrics(run: Run) -> list[Row]:
    """The run's lines; an evaluation's file has none."""
    return read_rows(RunFolder(run.path).metrics) if run.file is None else []


def _weightless(block: Any) -> set[str]:
    """The rewards of a recipe's block that are only watched: their weight is 0 wherever they are listed."""
    listed = list(_weights(block))
    return {name for name, _ in listed} - {name for name, weight in listed if weight != 0}


def _weights(block: Any) -> Iterator[tuple[str, Any]]:
    """(name, weight) of the rewards that sources and terms list, wherever they are."""
    if isinstance(block, Mapping):
        for key, value in block.items():
            if key == "rewards" and isinstance(value, Mapping):
                for name, one in value.items():
                    yield str(name), one.get("weight", 1.0) if isinstance(one, Mapping) else one
            elif key != "evaluate":
                yield from _weights(value)
    elif isinstance(block, list):
        for item in block:
            yield from _weights(item)


def read_rows(path: Path) -> list[Row]:
    """The lines of a .jsonl file, none if there is no file; an incomplete last line of a running run is left out."""
    if not path.exists():
        return []
    check_regular(path)
    rows: list[Row] = []
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            fault = _add(rows, line, f"{path}: line {number}")
            if fault is not None and file.read(1):
                raise fault
    return rows


def _add(rows: list[Row], line: bytes, where: str) -> UserError | None:
    """Add a line's figures to the rows, or return the error."""
    try:
        row = parse_json(line.decode("utf-8"), where=where)
        step = row["step"]
        if isinstance(step, bool) or int(step) != step or not 0 <= step < MAX_STEP:
            raise ValueError(f"step is {step!r:.60}")
    except UserError as error:
        return error
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        return UserError(f"{where} is not a line of a run's metrics ({type(error).__name__}: {error}).")
    rows.append(row | {"step": int(step)})
    return None


def _is_main(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last in ("loss", "reward", "grad_norm") or "/reward/" in name or name.startswith("cosine/")


def _axis(rows: Sequence[Row], ends: Sequence[int], name: str, *, summed: bool) -> list[float] | None:
    """An axis at the bins' ends; None unless every step has it."""
    values = np.array([_number(row.get(name)) for row in rows])
    if summed:
        values = values.cumsum()
    if not len(values) or not np.isfinite(values).all():
        return None
    return [round(float(values[end]), 2) for end in ends]


def _number(value: Any) -> float:
    """NaN for anything that a plot cannot show."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < MAX_NUMBER else math.nan


def _or_none(value: Any) -> float | None:
    number = _number(value)
    return None if math.isnan(number) else number


def _mean(values: Any) -> float | None:
    known = values[~np.isnan(values)]
    return _short(float(known.mean())) if len(known) else None


def _short(value: float) -> float:
    return float(f"{value:.5g}")
