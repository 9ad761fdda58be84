"""Cells on an executor, in the order of their dependencies, and the board that says how each of them stands."""

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
        result = read_result(self.plan.run(cell.name), job_of(self.plan, cell))
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
        result = read_result(self.plan.run(cell.name), job_of(self.plan, cell))
        if outcome.code == 0 and result is not None:
            self.board.end(cell.name, result=result, error=None)
            return
        how = f"exit code {outcome.code}" if outcome.code >= 0 else f"killed by {signal.Signals(-outcome.code).name}"
        log = self.plan.folder / "logs" / f"{cell.name}.log"
        self.board.end(cell.name, result=None, error=f"{how}, see {log}\n{outcome.last_lines}".rstrip())
