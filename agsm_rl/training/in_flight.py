"""Calls one after another in their own thread, while the caller continues: rewards that are scored elsewhere.

Unlike an executor's, the thread is a daemon: a program can exit without waiting for a reward that does not answer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self


class InFlight:
    """Within the block, `submit` gives a Future of a call; the calls run one after another, in the order given.

    After a call fails, or the block is left, calls that have not started are dropped; one that is running is
    abandoned.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._left = threading.Event()
        self._name = name

    def __enter__(self) -> Self:
        threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        self._calls.put(None)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """The Future of a call, whose result and errors are those of the call."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def _work(self) -> None:
        while (job := self._calls.get()) is not None:
            future, call = job
            if self._left.is_set():
                future.cancel()
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # raised to whoever asks for the result
                self._left.set()
                future.set_exception(error)
