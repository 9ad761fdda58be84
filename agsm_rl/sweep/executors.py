"""Where cells run: processes on this machine (concurrent.futures), or a Ray cluster. Both return futures.

Either way each cell has its own process, so one that fails or runs out of memory does not affect the others. A cell
ends by itself when the sweep is gone: it waits for the end of a pipe that only the sweep (or Ray's worker) holds open.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from agsm_rl_rewards.worker.ray_cluster import import_ray, start_ray

from agsm_rl.threads import MODE, is_followed

SHOWN_LINES = 5
"""Lines of a failed cell's log that are shown."""
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
}
"""glibc returns freed memory at once, which makes steps on a CPU up to three times slower; this makes it keep it."""


@dataclass(frozen=True)
class Outcome:
    """How a cell's process ended: its exit code (negative: killed by that signal), its duration, and its last lines."""

    code: int
    seconds: float
    last_lines: str


class Executor(Protocol):
    """Runs the cells of job files, at most `capacity` at once."""

    capacity: int

    def submit(self, job: Path, log: Path) -> Future[Outcome]:
        """Run the cell of a job file."""
        ...

    def stop(self) -> None:
        """Tell all running cells to end."""
        ...


@contextmanager
def open_executor(kind: Literal["local", "ray"], *, workers: int | None) -> Iterator[Executor]:
    """An executor of that kind. At the end of the block, running cells are told to stop, and waited for."""
    if kind == "ray":
        with _ray(workers) as executor:
            yield executor
        return
    local = LocalExecutor(workers or 1)
    try:
        yield local
    finally:
        local.close()


class LocalExecutor:
    """Up to `workers` processes at once on this machine, which share its cores evenly."""

    def __init__(self, workers: int) -> None:
        self.capacity = workers
        self.threads = threads_per_worker(workers)
        # Cells inherit the read end. They stop when the write end closes, whether we close it or die.
        self._read, write = os.pipe()
        self._write = os.fdopen(write, "wb")
        self._pool = ThreadPoolExecutor(workers)

    def submit(self, job: Path, log: Path) -> Future[Outcome]:
        """Run the cell of a job file."""
        return self._pool.submit(run_job, job, log, self.threads, self._read, follow=is_followed())

    def stop(self) -> None:
        """Tell all running cells to end; each writes a checkpoint first."""
        self._write.close()

    def close(self) -> None:
        """Stop all running cells and wait for them."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        os.close(self._read)


def threads_per_worker(workers: int) -> int:
    """Threads per worker: workers that use all cores each slow one another down many times over."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def run_job(
    job: Path, log: Path, threads: int, lifeline: int | None = None, cwd: str | None = None, *, follow: bool = False
) -> Outcome:
    """Run a cell in a process and wait for it; its output is appended to `log`.

    follow: with fewer threads while cores are taken (agsm_rl/threads.py).
    """
    # OMP_NUM_THREADS as the user set it is an upper limit.
    given = os.environ.get("OMP_NUM_THREADS", "")
    allowed = min(threads, int(given)) if given.isdigit() and int(given) else threads
    mode = {MODE: "auto" if follow else "fixed"}
    environment = KEEP_FREED_MEMORY | os.environ | mode
    environment |= {"OMP_NUM_THREADS": str(allowed), "PYTHONUNBUFFERED": "1"}
    started, before = time.monotonic(), log.stat().st_size if log.exists() else 0
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "agsm_rl.sweep.cell", str(job)],
            stdin=subprocess.PIPE if lifeline is None else lifeline,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
            # Ctrl-C goes to the sweep, which then stops its cells.
            start_new_session=True,
        )
        code = process.wait()
    if process.stdin is not None:
        process.stdin.close()
    with log.open("rb") as file:
        file.seek(before)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return Outcome(code, time.monotonic() - started, "\n".join(lines[-SHOWN_LINES:]))


@contextmanager
def _ray(workers: int | None) -> Iterator[Executor]:
    """Run cells as tasks on the cluster at RAY_ADDRESS, or on a Ray that is started on this machine."""
    ray = import_ray("--executor ray")
    start_ray(who="--executor ray")
    try:
        yield RayExecutor(workers)
    finally:
        ray.shutdown()


class RayExecutor:
    """Tasks on a Ray cluster, with one GPU each if it has GPUs. All machines must see the sweep's folder."""

    def __init__(self, workers: int | None) -> None:
        import ray

        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self.capacity = workers or gpus or cores
        # A task must fit on one machine.
        smallest_node = min(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
        self.threads = max(1, min(cores // self.capacity, smallest_node))
        self._run: Any = ray.remote(run_job).options(num_cpus=self.threads, num_gpus=1 if gpus else 0, max_retries=0)
        self._running: list[Any] = []

    def submit(self, job: Path, log: Path) -> Future[Outcome]:
        """Run the cell of a job file somewhere on the cluster."""
        reference = self._run.remote(
            job.absolute(), log.absolute(), self.threads, None, os.getcwd(), follow=is_followed()
        )
        self._running.append(reference)
        future: Future[Outcome] = reference.future()
        return future

    def stop(self) -> None:
        """Cancel all tasks; a cell ends with the worker that holds its pipe."""
        import ray

        for reference in self._running:
            ray.cancel(reference, force=True)
