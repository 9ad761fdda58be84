"""A small second process that ends this process's workers when it is killed, even if a worker hangs.

A worker itself notices that its client is gone only once it listens (agsm_rl_worker.serve), and not while it hangs in
an import or in native code. Run as a script, this file is that small process; it needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading

SECONDS_BETWEEN_LOOKS = 1.0
_lock = threading.Lock()
_current: Watchdog | None = None


class Watchdog:
    """The second process: ends the processes that it watches as soon as the process that created it is gone."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self.owner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # what ends our group (Ctrl-C, a scheduler) must not end it first
        )

    @property
    def is_running(self) -> bool:
        """Whether it accepts orders."""
        return self._process.poll() is None

    def tell(self, order: str, number: int) -> None:
        """Start (`+`) or stop (`-`) watching a process group, or start watching a single process (`@`)."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it was killed; the next worker gets a new one
            self._process.stdin.write(f"{order}{number}\n".encode())


def watch(group: int) -> None:
    """End a process group when this process is gone, however it ends."""
    _tell("+", group)


def watch_process(process: int) -> None:
    """The same for a single process, on Linux; a later process that reuses its number is left alone."""
    _tell("@", process)


def _tell(order: str, number: int) -> None:
    global _current
    with _lock:
        if _current is None or _current.owner != os.getpid() or not _current.is_running:
            _current = Watchdog()
        _current.tell(order, number)


def release(group: int) -> None:
    """Stop watching a process group that has ended; its number may be reused."""
    with _lock:
        if _current is not None and _current.owner == os.getpid():
            _current.tell("-", group)


def wait_and_end(parent: int) -> None:
    """The second process's loop: read orders from stdin until it closes or the parent is gone, then end the rest."""
    groups: set[int] = set()
    processes: dict[int, str | None] = {}
    received = b""
    while True:
        # The end of stdin is not enough: a fork of the parent may hold the pipe open. Whatever was sent is read first.
        is_orphan = os.getppid() != parent
        if not select.select([0], [], [], 0 if is_orphan else SECONDS_BETWEEN_LOOKS)[0]:
            if is_orphan:
                break
            continue
        part = os.read(0, 4096)
        if not part:
            break
        *lines, received = (received + part).split(b"\n")
        for line in lines:
            order, number = line[:1], int(line[1:])
            if order == b"@":
                processes[number] = start_of(number)
            else:
                (groups.add if order == b"+" else groups.discard)(number)
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for process, started in processes.items():
        if started is not None and start_of(process) == started:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)


def start_of(process: int) -> str | None:
    """When a process was started, in ticks since the machine was; None where that cannot be known."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


if __name__ == "__main__":
    wait_and_end(int(sys.argv[1]))
