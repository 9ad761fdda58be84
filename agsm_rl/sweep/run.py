"""Run a sweep: cells in the order of their dependencies, as many at once as fit; a failed one stops no other."""

from __future__ import annotations

import heapq
import math
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live

from agsm_rl.errors import UserError
from agsm_rl.recipe.schema import Recipe
from agsm_rl.run.folder import check_same, write_text
from agsm_rl.run.stop import Stopped
from agsm_rl.sweep.board import Board
from agsm_rl.sweep.executors import Executor, Outcome
from agsm_rl.sweep.job import Job, job_of, read_result
from agsm_rl.sweep.plan import Cell, Plan

HEADER = "# Resolved: the base recipe and all that is evaluated are written out. Go on with it by `agsm-rl sweep`.\n"


class SweepStopped(Stopped):
    """The sweep was stopped by a signal; its cells have written checkpoints."""

    def __init__(self, folder: Path, number: int) -> None:
        self.exit_code = 128 + number
        name = signal.Signals(number).name
        Exception.__init__(self, f"stopped by {name}. To continue: agsm-rl sweep {folder / 'sweep.yaml'}")


class _Signal(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def run_sweep(plan: Plan, executor: Executor, *, console: Console | None = None) -> Board:
    """Run what is unfinished of a sweep and return the board of its cells.

    Raises UserError before anything runs when the folder holds other runs or is busy, SweepStopped after a signal.
    """
    console = console or Console()
    _check_folder(plan)
    if plan.sweep.search is not None:
        from agsm_rl.sweep.search import check_installed

        check_installed()
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _only_sweep_in(plan.folder):
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
            board.stopped()
    return board


def _run(runner: Runner) -> None:
    if runner.plan.sweep.search is None:
        runner.run(runner.plan.cells)
        return
    from agsm_rl.sweep.search import search

    search(runner)


class Runner:
    """Runs cells on an executor and keeps the board. A search runs several trials' cells from threads of its own."""

    def __init__(self, plan: Plan, board: Board, executor: Executor) -> None:
        self.plan, self.board, self.executor = plan, board, executor
        self.stopping = False
        self._running: dict[str, Future[Outcome]] = {}
        self._lock = threading.RLock()

    def stop(self) -> None:
        """Tell all cells to write a checkpoint and end; nothing is begun or noted any more."""
        self.stopping = True
        self.executor.stop()

    def run(self, cells: list[Cell]) -> None:
        """Run all cells that are not done, those first that stand first, each after the one that it starts from."""
        self.board.add(cells)
        for cell in cells:
            self.look(cell)
        by_name = {cell.name: cell for cell in cells}
        place = {name: index for index, name in enumerate(by_name)}
        graph = TopologicalSorter({cell.name: [cell.after] if cell.after else [] for cell in cells})
        graph.prepare()
        ready: list[tuple[int, str]] = []
        running: dict[Future[Outcome], str] = {}
        while graph.is_active() and not self.stopping:
            for name in graph.get_ready():
                heapq.heappush(ready, (place[name], name))
            while ready and len(running) < self.executor.capacity:
                name = heapq.heappop(ready)[1]
                future = self.start(by_name[name])
                if future is None:
                    graph.done(name)
                else:
                    running[future] = name
            if not running:
                continue
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                self.finish(by_name[name], future)
                graph.done(name)

    def look(self, cell: Cell) -> None:
        """Note a cell that is done already, wherever it stands in the order."""
        result = read_result(self.plan.run(cell.name), job_of(self.plan, cell).fingerprint)
        if result is not None:
            self.board.found_done(cell.name, result)

    def start(self, cell: Cell) -> Future[Outcome] | None:
        """Begin a cell, or join it where it runs for another trial of the same values.

        None when there is nothing to run: it is done, or what it starts from has failed.
        """
        with self._lock:
            if cell.name not in self._running:
                future = self._submit(cell)
                if future is None:
                    return None
                self._running[cell.name] = future
            return self._running[cell.name]

    def _submit(self, cell: Cell) -> Future[Outcome] | None:
        if self.board.states[cell.name].status == "done":
            return None
        if cell.after is not None and self.board.states[cell.after].status == "failed":
            self.board.end(cell.name, result=None, error=f"not started, because '{cell.after}' failed")
            return None
        file = self.plan.folder / "jobs" / f"{cell.name}.yaml"
        job_of(self.plan, cell).write(file)
        self.board.start(cell.name)
        return self.executor.submit(file, self.plan.folder / "logs" / f"{cell.name}.log")

    def finish(self, cell: Cell, future: Future[Outcome]) -> None:
        """Note how a cell ended, once, unless it was by our own wish."""
        with self._lock:
            if self._running.pop(cell.name, None) is not None and not self.stopping:
                self._note(cell, future)

    def _note(self, cell: Cell, future: Future[Outcome]) -> None:
        try:
            outcome = future.result()
        except Exception as error:  # noqa: BLE001 - whatever an executor fails with, the other cells go on
            self.board.end(cell.name, result=None, error=f"{type(error).__name__}: {error}")
            return
        result = read_result(self.plan.run(cell.name), job_of(self.plan, cell).fingerprint)
        if outcome.code == 0 and result is not None:
            self.board.end(cell.name, result=result, error=None)
            return
        how = f"exit code {outcome.code}" if outcome.code >= 0 else f"killed by {signal.Signals(-outcome.code).name}"
        log = self.plan.folder / "logs" / f"{cell.name}.log"
        self.board.end(cell.name, result=None, error=f"{how}, see {log}\n{outcome.last_lines}".rstrip())


def _check_folder(plan: Plan) -> None:
    """Runs that are there already must be this sweep's."""
    if plan.folder.exists() and not plan.folder.is_dir():
        raise UserError(f"{plan.folder}: is a file; give a folder as --dir.")
    if plan.folder.is_dir() and any(plan.folder.iterdir()) and not (plan.folder / "sweep.yaml").is_file():
        raise UserError(f"{plan.folder}: is not empty and no sweep's folder; choose another --dir.")
    wanted = {cell.name: _Length(cell.recipe.steps, cell.seconds) for cell in plan.cells}
    kept = {cell.name: _kept_length(plan, cell) for cell in plan.cells}
    for cell in plan.cells:
        found = kept[cell.name]
        if found is None:
            continue
        if found.is_more_than(wanted[cell.name]):
            raise _other_length(plan, cell, cell.name, wanted[cell.name])
        # What a cell has begun with must still be what it would begin with.
        start = kept[cell.after] if cell.after else None
        if cell.after and start is not None and start != wanted[cell.after]:
            raise _other_length(plan, cell, cell.after, wanted[cell.after])


class _Length(NamedTuple):
    """How long a cell trains: steps, or seconds where these are its budget."""

    steps: int
    seconds: float | None

    def is_more_than(self, other: _Length) -> bool:
        """Whether what was begun goes beyond the other."""
        return self.steps > other.steps or (self.seconds or 0) > (other.seconds or math.inf)

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.seconds is None else f"{self.seconds:g} seconds"


def _other_length(plan: Plan, cell: Cell, changed: str, length: _Length) -> UserError:
    return UserError(
        f"{plan.run(changed)}: was begun with another budget than the {length} it has now, and cell "
        f"'{cell.name}' cannot go on with that; choose another --dir, or remove these cells."
    )


def _kept_length(plan: Plan, cell: Cell) -> _Length | None:
    """How long a cell was to train when it was begun; None if it was not."""
    kept, file = _kept_recipe(plan, cell), plan.folder / "jobs" / f"{cell.name}.yaml"
    if kept is None:
        return None
    return _Length(kept.steps, Job.read(file).seconds if file.is_file() else cell.seconds)


def _kept_recipe(plan: Plan, cell: Cell) -> Recipe | None:
    """The recipe that a cell was begun with; UserError where the sweep has changed it since."""
    file = plan.run(cell.name) / "recipe.yaml"
    if not file.is_file():
        return None
    kept = Recipe.from_yaml(file, allow_imports=plan.allow_imports)
    try:
        check_same(cell.recipe, kept, file)
    except UserError as error:
        message = str(error).split(" Resume with")[0]
        raise UserError(f"{message} The sweep was changed: choose another --dir, or remove that cell.") from error
    return kept


@contextmanager
def _only_sweep_in(folder: Path) -> Iterator[None]:
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: is busy, a sweep runs in it already. Wait for it or stop it.") from error
    with lock:
        yield


@contextmanager
def _signals_stop(runner: Runner) -> Iterator[None]:
    """SIGINT and SIGTERM break the sweep off in order."""

    def note(number: int, frame: FrameType | None) -> None:
        runner.stop()
        raise _Signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _live(board: Board, console: Console) -> Iterator[None]:
    """The table, redrawn each second; on no terminal the lines alone."""
    if not console.is_terminal:
        yield
        return
    with Live(get_renderable=board.__rich__, console=console, refresh_per_second=1):
        yield
