"""Runs cells on an executor in the order of their dependencies, and keeps the board up to date."""

from __future__ import annotations

import heapq
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from graphlib import TopologicalSorter

from agsm_rl.sweep.board import Board
from agsm_rl.sweep.executors import Executor, Outcome
from agsm_rl.sweep.job import job_of, read_result
from agsm_rl.sweep.plan import Cell, Plan


class Runner:
    """Runs cells on an executor and updates the board. A search runs the cells of several trials from threads."""

    def __init__(self, plan: Plan, board: Board, executor: Executor) -> None:
        self.plan, self.board, self.executor = plan, board, executor
        self.stopping = False
        self._running: dict[str, Future[Outcome]] = {}
        self._lock = threading.RLock()

    def stop(self) -> None:
        """Tell all cells to write a checkpoint and end. No more cells are started or recorded."""
        self.stopping = True
        self.executor.stop()

    def run(self, cells: list[Cell]) -> None:
        """Run all cells that are not done, in their order, each after the one that it starts from."""
        self.board.add(cells)
        for cell in cells:
            self.note_if_done(cell)
        by_name = {cell.name: cell for cell in cells}
        position = {name: index for index, name in enumerate(by_name)}
        graph = TopologicalSorter({cell.name: [cell.after] if cell.after else [] for cell in cells})
        graph.prepare()
        ready: list[tuple[int, str]] = []
        running: dict[Future[Outcome], str] = {}
        while graph.is_active() and not self.stopping:
            for name in graph.get_ready():
                heapq.heappush(ready, (position[name], name))
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

    def note_if_done(self, cell: Cell) -> None:
        """Record a cell that is already done, wherever it is in the order."""
        result = read_result(self.plan.run(cell.name), job_of(self.plan, cell))
        if result is not None:
            self.board.mark_done(cell.name, result)

    def start(self, cell: Cell) -> Future[Outcome] | None:
        """Start a cell, or join it if it is already running for another trial with the same values.

        None if there is nothing to run: the cell is done, or the cell that it starts from has failed.
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
        """Record how a cell ended, once, unless we stopped it ourselves."""
        with self._lock:
            if self._running.pop(cell.name, None) is not None and not self.stopping:
                self._note(cell, future)

    def _note(self, cell: Cell, future: Future[Outcome]) -> None:
        try:
            outcome = future.result()
        except Exception as error:  # noqa: BLE001 - however the executor fails, the other cells continue
            self.board.end(cell.name, result=None, error=f"{type(error).__name__}: {error}")
            return
        result = read_result(self.plan.run(cell.name), job_of(self.plan, cell))
        if outcome.code == 0 and result is not None:
            self.board.end(cell.name, result=result, error=None)
            return
        ending = f"exit code {outcome.code}" if outcome.code >= 0 else f"killed by {signal.Signals(-outcome.code).name}"
        log = self.plan.folder / "logs" / f"{cell.name}.log"
        self.board.end(cell.name, result=None, error=f"{ending}, see {log}\n{outcome.last_lines}".rstrip())
