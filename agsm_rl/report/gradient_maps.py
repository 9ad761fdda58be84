"""gradient_map.jsonl as tables: where two terms agreed or fought, over a run's looks, and what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agsm_rl.errors import UserError
from agsm_rl.report.history import read_rows
from agsm_rl.report.runs import Run
from agsm_rl.run.agreement import SMALL
from agsm_rl.run.folder import RunFolder

SHADES = 3
"""Shades of each sign; a cosine of 0.5 or more has the darkest."""
UNEQUAL = 10.0
"""One term's gradient is called much longer than another's from this factor on."""


@dataclass(frozen=True)
class Cell:
    """A mean cosine in [-1, 1] and its shade, -SHADES to SHADES; None where the terms never met."""

    cosine: float | None

    @property
    def shade(self) -> int:
        """How dark the cell is, with the cosine's sign; 0 for a small one."""
        if self.cosine is None or abs(self.cosine) < SMALL:
            return 0
        return int(np.sign(self.cosine)) * min(SHADES, 1 + int(abs(self.cosine) / 0.25))

    def __str__(self) -> str:
        return "–" if self.cosine is None else f"{self.cosine:+.2f}".replace("-", "−")


@dataclass(frozen=True)
class PairMap:
    """Two terms of a run: a row for each block, a column for each range of noise levels."""

    run: str
    first: str
    second: str
    looks: int
    levels: list[str]
    rows: list[tuple[str, list[Cell]]]
    advice: list[str]


def gradient_maps(runs: Sequence[Run]) -> list[PairMap]:
    """The maps of all runs that have looked at their gradients, with advice."""
    return [pair for run in runs if run.file is None for pair in _of_run(run)]


def _of_run(run: Run) -> list[PairMap]:
    file = RunFolder(run.path).gradient_map
    looks = read_rows(file)
    if not looks:
        return []
    if not all(_is_whole(look) for look in looks):
        raise UserError(f"{file}: a line is not a look at gradients; move the file away to leave it out of the report.")
    edges, blocks = looks[-1]["edges"], looks[-1]["blocks"]
    looks = [look for look in looks if look["edges"] == edges and look["blocks"] == blocks]
    levels = [f"{low:.2g} to {high:.2g}" for low, high in zip(edges, edges[1:], strict=False)]
    lengths = _lengths(run)
    maps = []
    for pair in dict.fromkeys(name for look in looks for name in look["cosines"]):
        first, _, second = pair.partition("/")
        seen = [look["cosines"][pair] for look in looks if pair in look["cosines"]]
        table = _mean(seen, levels=len(levels), blocks=len(blocks))
        rows = [
            (block, [Cell(_number(table[level, column])) for level in range(len(levels))])
            for column, block in enumerate(blocks)
        ]
        advice = _advice_on_levels(table, edges, first, second) + _advice_on_lengths(lengths, first, second)
        maps.append(PairMap(run.name, first, second, len(seen), levels, rows, advice))
    return maps


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a line has what a look writes: [levels][blocks] of cosines, or nulls, for each pair."""
    edges, blocks, cosines = row.get("edges"), row.get("blocks"), row.get("cosines")
    if not isinstance(edges, list) or not isinstance(blocks, list) or not isinstance(cosines, dict):
        return False
    tables = [look for look in cosines.values() if isinstance(look, list) and len(look) == len(edges) - 1]
    lines = [line for look in tables for line in look if isinstance(line, list) and len(line) == len(blocks)]
    values = [value for line in lines for value in line]
    return (
        len(lines) == len(cosines) * (len(edges) - 1)
        and all(isinstance(edge, int | float) for edge in edges)
        and all(value is None or (isinstance(value, int | float) and -1 <= value <= 1) for value in values)
    )


def _mean(looks: Sequence[Any], *, levels: int, blocks: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean over looks [levels, blocks], without those in which the terms did not meet; NaN where they never did."""
    stack = np.array([[[np.nan if value is None else value for value in row] for row in look] for look in looks], float)
    stack = stack.reshape(len(looks), levels, blocks)
    counts = (~np.isnan(stack)).sum(axis=0)
    return np.where(counts > 0, np.nansum(stack, axis=0) / np.maximum(counts, 1), np.nan)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _advice_on_levels(table: np.ndarray[Any, Any], edges: Sequence[float], first: str, second: str) -> list[str]:
    """What to do about noise levels, or all levels, at which the two fight."""
    means = [float(np.nanmean(row)) if not np.isnan(row).all() else None for row in table]
    fights = [index for index, mean in enumerate(means) if mean is not None and mean < -SMALL]
    known = [index for index, mean in enumerate(means) if mean is not None]
    if not fights:
        return []
    if len(fights) == len(known):
        return [
            f"{first} and {second} fight at every noise level: train separate adapters (`trains:`), or try "
            "`combine: upgrad`."
        ]
    where = ", ".join(f"{edges[index]:.2g} to {edges[index + 1]:.2g}" for index in fights)
    return [f"{first} and {second} fight at noise levels {where} alone: keep one of them out by `t: [low, high]`."]


def _lengths(run: Run) -> dict[str, float]:
    """The median length of each term's gradient, weights included; without terms whose weight is a schedule."""
    steps = read_rows(RunFolder(run.path).metrics)
    lengths = {}
    for term in run.recipe.get("objectives", []):
        name, weight = term.get("name"), term.get("weight", 1.0)
        values = [
            step[f"{name}/grad_norm"] * step.get(f"{name}/balance", 1.0)
            for step in steps
            if isinstance(step.get(f"{name}/grad_norm"), int | float)
        ]
        if values and isinstance(weight, int | float):
            lengths[name] = abs(weight) * float(np.median(values))
    return lengths


def _advice_on_lengths(lengths: Mapping[str, float], first: str, second: str) -> list[str]:
    """What to do about gradients of very different length."""
    if first not in lengths or second not in lengths:
        return []
    short, long = sorted((first, second), key=lengths.__getitem__)
    if lengths[short] <= 0 or lengths[long] < UNEQUAL * lengths[short]:
        return []
    return [
        f"The gradient of {long} is {lengths[long] / lengths[short]:.0f} times as long as that of {short}, weights "
        "included: `weights: {balance: gradient_norm}` makes weights comparable."
    ]
