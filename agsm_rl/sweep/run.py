"""Run a sweep: cells in the order of their dependencies, as many at once as fit. A failed cell does not stop others."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live

from agsm_rl.errors import UserError
from agsm_rl.evaluate.kept_files import warn_damaged
from agsm_rl.files import check_contained, check_kinds, write_text
from agsm_rl.recipe.earlier import read_earlier, recipe_of_today
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.folder import check_same
from agsm_rl.run.screen import make_console
from agsm_rl.run.stop import Stopped
from agsm_rl.sweep.board import Board
from agsm_rl.sweep.executors import Executor
from agsm_rl.sweep.first_version import add_settings
from agsm_rl.sweep.job import Job, job_of, kept_starts
from agsm_rl.sweep.plan import Cell, Plan
from agsm_rl.sweep.runner import Runner

HEADER = "# Resolved: the base recipe and all evaluations are written out. Continue it with `agsm-rl sweep`.\n"
SWEEP_FILES = dict.fromkeys(("sweep.yaml", "sweep.json", "sweep.log", "search.log", ".lock"), "a file")
SWEEP_FILES |= dict.fromkeys(("jobs", "logs", "base", "cells"), "a folder")
"""What a sweep writes into its folder, and of which kind each is."""


class SweepStopped(Stopped):
    """A signal stopped the sweep; its cells have written checkpoints."""

    def __init__(self, folder: Path, number: int) -> None:
        self.exit_code = 128 + number
        name = signal.Signals(number).name
        Exception.__init__(self, f"stopped by {name}. To continue: agsm-rl sweep {folder / 'sweep.yaml'}")


class _Signal(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def run_sweep(plan: Plan, executor: Executor, *, console: Console | None = None) -> Board:
    """Run the unfinished cells of a sweep and return the board of all cells.

    Raises UserError, before anything runs, if the folder contains other runs or is busy; SweepStopped after a signal.
    """
    console = console or make_console()
    _check_folder(plan)
    if plan.sweep.search is not None:
        from agsm_rl.sweep.search import check_installed

        check_installed()
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _only_sweep_in(plan.folder):
        add_settings(plan.folder)
        write_text(plan.folder / "sweep.yaml", HEADER + yaml.safe_dump(plan.to_data(), sort_keys=False, width=120))
        search = plan.sweep.search
        total = search.trials * len(plan.sweep.seed_list) if search else None
        board = Board(plan, console, capacity=executor.capacity, total=total)
        runner = Runner(plan, board, executor)
        try:
            with _signals_stop(runner), _live(board, console):
                _run(runner)
        except _Signal as stop:
            raise SweepStopped(plan.folder, stop.number) from stop
        finally:
            board.mark_stopped()
    return board


def _run(runner: Runner) -> None:
    if runner.plan.sweep.search is None:
        runner.run(runner.plan.cells)
        return
    from agsm_rl.sweep.search import search

    search(runner)


def _check_folder(plan: Plan) -> None:
    """Raise a UserError unless the folder is new or already belongs to this sweep."""
    if plan.folder.exists() and not plan.folder.is_dir():
        raise UserError(f"{plan.folder}: is a file; pass a folder to --dir.")
    if plan.folder.is_dir():
        check_contained(plan.folder, [name for name in SWEEP_FILES if os.path.lexists(plan.folder / name)])
        check_kinds(plan.folder, SWEEP_FILES)
        if any(plan.folder.iterdir()) and not (plan.folder / "sweep.yaml").is_file():
            raise UserError(f"{plan.folder}: is not empty and does not belong to a sweep; choose another --dir.")
    wanted = {cell.name: _Length(cell.recipe.steps, cell.seconds) for cell in plan.cells}
    kept = {cell.name: _kept_length(plan, cell) for cell in plan.cells}
    for cell in plan.cells:
        if cell.after is not None:
            _check_starts(plan, cell)
        length = kept[cell.name]
        if length is None:
            continue
        if length.is_more_than(wanted[cell.name]):
            raise _other_length(plan, cell, cell.name, wanted[cell.name])
        # The cell that this one was started from must not have changed its length since.
        start = kept[cell.after] if cell.after else None
        if cell.after and start is not None and start != wanted[cell.after]:
            raise _other_length(plan, cell, cell.after, wanted[cell.after])


def _check_starts(plan: Plan, cell: Cell) -> None:
    """Raise a UserError if a cell was trained from one that the sweep now trains differently.

    The start's own folder does not tell: it may have been removed, or trained anew.
    """
    kept, wanted = kept_starts(plan, cell), job_of(plan, cell).starts
    for start in plan.starts(cell):
        then, now, run = kept.get(start.name), wanted[start.name], plan.run(start.name)
        if then is None or then == now:
            continue
        try:
            recipe = recipe_of_today(then.recipe, where=str(run), allow_imports=plan.allow_imports)
            check_same(start.recipe, recipe, run)
        except UserError as error:
            raise UserError(
                f"{_difference(error)} Cell '{cell.name}' was trained from the adapters that this gave then: "
                f"{_way_out(plan, start)}"
            ) from error
        if then.limit != now.limit:
            raise _other_length(plan, cell, start.name, _Length(start.recipe.steps, start.seconds))


def _difference(error: UserError) -> str:
    """What `check_same` found, without its advice, which is for runs."""
    return str(error).split(" Resume with")[0]


def _way_out(plan: Plan, cell: Cell) -> str:
    """What to do when a cell has changed. Those that start from it must go too."""
    names = [cell.name] + [other.name for other in plan.cells if cell.name in [c.name for c in plan.starts(other)]]
    there = [name for name in names if plan.run(name).exists()]
    return f"choose another --dir, or remove from {plan.folder / 'cells'}: {', '.join(there)}."


class _Length(NamedTuple):
    """How long a cell trains: in steps, or in seconds if its budget is in seconds."""

    steps: int
    seconds: float | None

    def is_more_than(self, other: _Length) -> bool:
        """Whether this length exceeds the other."""
        return self.steps > other.steps or (self.seconds or 0) > (other.seconds or math.inf)

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.seconds is None else f"{self.seconds:g} seconds"


def _other_length(plan: Plan, cell: Cell, changed: str, length: _Length) -> UserError:
    return UserError(
        f"{plan.run(changed)}: was started with a different budget than the {length} that it has now, so cell "
        f"'{cell.name}' cannot be continued; choose another --dir, or remove these cells."
    )


def _kept_length(plan: Plan, cell: Cell) -> _Length | None:
    """How long a cell was meant to train when it was started; None if it has not been started."""
    kept, file = _kept_recipe(plan, cell), plan.folder / "jobs" / f"{cell.name}.yaml"
    if kept is None:
        return None
    try:
        return _Length(kept.steps, Job.read(file).seconds if file.exists() else cell.seconds)
    except UserError as error:
        warn_damaged(file, str(error))
        return _Length(kept.steps, cell.seconds)


def _kept_recipe(plan: Plan, cell: Cell) -> Recipe | None:
    """The recipe that a cell was started with; UserError if the sweep has changed it since."""
    file = plan.run(cell.name) / "recipe.yaml"
    if not file.exists():
        return None
    try:
        kept = read_earlier(file, allow_imports=plan.allow_imports)
    except UserError:  # the cell will fail with this message, and the others will run
        return None
    try:
        check_same(cell.recipe, kept, file)
    except UserError as error:
        raise UserError(f"{_difference(error)} The sweep has changed: {_way_out(plan, cell)}") from error
    return kept


@contextmanager
def _only_sweep_in(folder: Path) -> Iterator[None]:
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another sweep is running in this folder; wait for it, or stop it.") from error
    with lock:
        yield


@contextmanager
def _signals_stop(runner: Runner) -> Iterator[None]:
    """SIGINT and SIGTERM stop the sweep cleanly."""

    def stop(number: int, frame: FrameType | None) -> None:
        runner.stop()
        raise _Signal(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _live(board: Board, console: Console) -> Iterator[None]:
    """Show the table, redrawn every second; without a terminal there are only log lines."""
    if not console.is_terminal:
        yield
        return
    with Live(get_renderable=board.__rich__, console=console, refresh_per_second=1):
        yield
