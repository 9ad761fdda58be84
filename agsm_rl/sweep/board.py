"""Progress of a sweep: the states of its cells, in sweep.json, in sweep.log, and as a live table."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from statistics import mean
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agsm_rl.files import write_text
from agsm_rl.run.screen import styled, tell
from agsm_rl.sweep.plan import Cell, Plan

Status = Literal["pending", "running", "done", "failed"]
NUM_LISTED = 5
"""Cells in the lists of the best and of the failed."""


@dataclass
class State:
    """A cell's state; `result` is its cell.json."""

    cell: Cell
    status: Status = "pending"
    error: str | None = None
    result: dict[str, Any] | None = None
    started: float = 0.0
    took: float | None = None


class Board:
    """The states of the cells. Every change is written to sweep.json and reported in one line."""

    def __init__(self, plan: Plan, console: Console, *, capacity: int, total: int | None = None) -> None:
        self.plan, self.console, self.capacity = plan, console, capacity
        self.states: dict[str, State] = {}
        self._total = total
        self._lock = threading.RLock()
        self.extra: dict[str, Any] = {}

    def add(self, cells: Iterable[Cell]) -> None:
        """Add pending cells; those already on the board keep their state."""
        with self._lock:
            for cell in cells:
                self.states.setdefault(cell.name, State(cell))
            self.write()

    def mark_done(self, name: str, result: dict[str, Any]) -> None:
        """Record a cell that was finished in an earlier session."""
        with self._lock:
            self.states[name].status, self.states[name].result = "done", result

    def start(self, name: str) -> None:
        """Record that a cell starts or continues."""
        with self._lock:
            state = self.states[name]
            state.status, state.error, state.started = "running", None, time.monotonic()
            self.log(f"{name}: {'continues' if self.plan.run(name).is_dir() else 'starts'}")
            self.write()

    def end(self, name: str, *, result: dict[str, Any] | None, error: str | None) -> None:
        """Record that a cell has finished or failed."""
        with self._lock:
            state = self.states[name]
            state.status, state.result, state.error = ("failed" if error else "done"), result, error
            if state.started:
                state.took = time.monotonic() - state.started
            if error:
                self.log(f"{name}: failed: {error}")
            else:
                self.log(f"{name}: done{_in(state.took)}{_score_text(self.plan, result)}{self._left_text()}")
            self.write()

    def mark_stopped(self) -> None:
        """Record that the sweep has ended: cells that were still running are pending again."""
        with self._lock:
            for state in self.states.values():
                state.status = "pending" if state.status == "running" else state.status
            self.write()

    def count(self, status: Status) -> int:
        """The number of cells in that state."""
        with self._lock:
            return sum(state.status == status for state in self.states.values())

    @property
    def total(self) -> int:
        """The number of all cells, including those that a search has yet to suggest."""
        return max(self._total or 0, len(self.states))

    def seconds_left(self) -> float | None:
        """An estimate from the times of finished cells, of the same variant if possible; None before the first."""
        with self._lock:
            times = {s.cell.variant: s.took for s in self.states.values() if s.took is not None and s.status == "done"}
            if not times:
                return None
            usual = mean(times.values())
            unfinished = [s for s in self.states.values() if s.status in ("pending", "running")]
            left = sum(max(0.0, times.get(s.cell.variant, usual) - self._elapsed(s)) for s in unfinished)
            return (left + usual * (self.total - len(self.states))) / self.capacity

    def _elapsed(self, state: State) -> float:
        return time.monotonic() - state.started if state.status == "running" else 0.0

    def _left_text(self) -> str:
        left = self.seconds_left()
        ended = self.count("done") + self.count("failed")
        return f" ({ended} of {self.total}{'' if left is None else f', about {_span(left)} left'})"

    def log(self, line: str) -> None:
        """Print a plain line, and add it to sweep.log with the time."""
        with self._lock:
            tell(self.console, line)
            with (self.plan.folder / "sweep.log").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def write(self) -> None:
        """Write sweep.json."""
        with self._lock:
            content = json.dumps(self.to_json(), indent=1)
            write_text(self.plan.folder / "sweep.json", content + "\n")

    def to_json(self) -> dict[str, Any]:
        """The content of sweep.json (docs/sweeps.md)."""
        plan, sweep = self.plan, self.plan.sweep
        base: dict[str, dict[str, Any]] = {}
        for state in self.states.values():
            for row in (state.result or {}).get("base", []):
                base[json.dumps(row)] = row
        return {
            "format": 1,
            "name": plan.name,
            "recipe": sweep.recipe if isinstance(sweep.recipe, str) else None,
            "budget": sweep.budget.model_dump(exclude_none=True) if sweep.budget else None,
            "seeds": sweep.seed_list,
            "reported": plan.reported_split,
            "evaluate": [evaluation.model_dump(mode="json", exclude={"every"}) for evaluation in plan.evaluations],
            "base": list(base.values()),
            **self.extra,
            "cells": [_cell_json(state) for state in self.states.values()],
        }

    def __rich__(self) -> RenderableType:
        """The live table: totals, running cells, failed cells, the best so far."""
        with self._lock:
            best = [self._best()] if self.plan.evaluations else []
            return Group(self._totals(), self._running(), *self._failed(), *best)

    def _totals(self) -> Text:
        left = self.seconds_left()
        parts = [f"{self.plan.name}: {self.count('done')} of {self.total} cells done"]
        parts += [f"{self.count('failed')} failed"] if self.count("failed") else []
        parts += (
            [f"about {_span(left)} left"] if left is not None and self.count("pending") + self.count("running") else []
        )
        return styled(", ".join(parts), "bold")

    def _running(self) -> Table:
        rows = Table.grid(padding=(0, 2))
        for state in self.states.values():
            if state.status == "running":
                share, stage = _progress(self.plan, state)
                bar = ProgressBar(total=1.0, completed=share, width=20)
                rows.add_row(state.cell.name, bar, stage, _span(self._elapsed(state)))
        return rows

    def _failed(self) -> list[Text]:
        failed = [state for state in self.states.values() if state.status == "failed"]
        return [styled(f"{s.cell.name}: {(s.error or '').splitlines()[-1]}", "red") for s in failed[-NUM_LISTED:]]

    def _best(self) -> Table:
        title = f"best cells ({self.plan.chosen_split}, {self.plan.ranked_by[0]})"
        best = Table(title=title, title_justify="left", box=None)
        for column in ("cell", "score", "at guidance"):
            best.add_column(column)
        scored = [(_best_row(self.plan, s.result), s.cell.name) for s in self.states.values() if s.result]
        for row, name in sorted(scored, key=lambda item: -rank(self.plan, item[0]))[:NUM_LISTED]:
            best.add_row(name, shown_value(self.plan, value_of(self.plan, row)), f"{row['guidance']:g}")
        return best


def _cell_json(state: State) -> dict[str, Any]:
    cell, result = state.cell, state.result or {}
    return {
        "cell": cell.name,
        "variant": cell.variant,
        "axes": cell.axes,
        "seed": cell.seed,
        "status": state.status,
        "run": f"cells/{cell.name}",
        "start_from": cell.after,
        "steps": result.get("steps"),
        "images": result.get("images"),
        "seconds": result.get("seconds"),
        "error": state.error,
        "evaluations": result.get("evaluations", []),
    }


def _progress(plan: Plan, state: State) -> tuple[float, str]:
    """The finished share of a running cell's training, and its stage in words."""
    run = plan.run(state.cell.name)
    if (run / "trained.json").is_file():
        finished = len(list((run / "evals").glob("*.json")))
        total = sum(len(evaluation.guidance) * len(evaluation.blocks) for evaluation in plan.evaluations)
        return 1.0, f"evaluation {finished} of {total}"
    step = _last_step(run / "metrics.jsonl")
    if state.cell.seconds is not None:
        return min(1.0, (time.monotonic() - state.started) / state.cell.seconds), f"step {step}"
    return step / state.cell.recipe.steps, f"step {step} of {state.cell.recipe.steps}"


def _last_step(file: Any) -> int:
    """The step of the last complete line of metrics.jsonl, read from the end of the file."""
    try:
        with file.open("rb") as lines:
            size = lines.seek(0, 2)
            lines.seek(max(0, size - 8192))
            last = lines.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        return int(json.loads(last)["step"])
    except (OSError, ValueError, KeyError):
        return 0


def _best_row(plan: Plan, result: dict[str, Any]) -> dict[str, Any]:
    rows = [row for row in result["evaluations"] if row["split"] == plan.chosen_split]
    best: dict[str, Any] = max(rows, key=lambda row: rank(plan, row))
    return best


def value_of(plan: Plan, row: dict[str, Any]) -> float:
    """The ranking score in a row of cell.json."""
    name, _ = plan.ranked_by
    scores = row.get("scores")
    return float(row[name] if scores is None else scores[name]["value"])


def rank(plan: Plan, row: dict[str, Any]) -> float:
    """The same, larger for the better."""
    return value_of(plan, row) if plan.ranked_by[1] else -value_of(plan, row)


def shown_value(plan: Plan, value: float) -> str:
    """A value of the ranking score: a share in percent, or a number."""
    name = plan.ranked_by[0]
    return f"{100 * value:.1f} %" if name.rpartition("/")[2] in ("strict", "overall") else f"{value:.4g}"


def _score_text(plan: Plan, result: dict[str, Any] | None) -> str:
    if result is None or not plan.evaluations:
        return ""
    row = _best_row(plan, result)
    shown = shown_value(plan, value_of(plan, row))
    return f"; {row['split']}, {plan.ranked_by[0]}: {shown} at guidance {row['guidance']:g}"


def _in(took: float | None) -> str:
    return "" if took is None else f" in {_span(took)}"


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
