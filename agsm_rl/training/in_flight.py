"""A call after another in a thread of its own, while the caller goes on: rewards that are scored elsewhere.

Unlike an executor's, the thread is a daemon: a program that is ended does not wait for a reward that does not answer.
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

    After a call that fails, and when the block is left, those that have not begun never do; one under way is left to
    itself.
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
            except BaseException as error:  # whoever asks for the result is told
                self._left.set()
                future.set_exception(error)
