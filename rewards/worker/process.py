"""The link to a worker over pipes: a child process in its own process group, with a deadline on every byte.

The worker's stdin and stdout carry frames. The last lines of its stderr are kept for messages and logged (debug).
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

from agsm_rl_rewards.worker import watchdog
from agsm_rl_rewards.worker.remote import Fault
from agsm_rl_rewards.worker_side import agsm_rl_worker as protocol
from agsm_rl_rewards.worker_side.agsm_rl_worker import Buffer, Frame, ProtocolError

from agsm_rl.errors import UserError

MAX_NOISE = 2**20
"""Bytes before the first frame, printed by whatever starts the worker, that are skipped."""
LINES_KEPT = 5
log = logging.getLogger(__name__)


class PipeLink:
    """Starts `command` with `environment` added to ours, and kills its process group in the end.

    That is when the link is closed or collected, or when this process is gone, even if it is killed. `prepare`, called
    before each start, returns command and environment instead, for those that are slow to find out.
    """

    def __init__(
        self,
        command: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
        *,
        prepare: Callable[[], tuple[Sequence[str], Mapping[str, str | None]]] | None = None,
    ) -> None:
        self._prepare = prepare or (lambda: (command, environment or {}))
        self._process: subprocess.Popen[bytes] | None = None
        self._words: collections.deque[str] = collections.deque(maxlen=LINES_KEPT)
        self._greeted = False

    @property
    def is_open(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The id of the process that was started."""
        return None if self._process is None else self._process.pid

    def open(self) -> None:
        command, added = self._prepare()
        changed = os.environ | added
        environment = {key: value for key, value in changed.items() if value is not None}
        self._words.clear()
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"the worker cannot be started: {error} (command: {list(command)})") from error
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        watchdog.watch(process.pid)
        self._process, self._greeted = process, False
        self._reader = threading.Thread(target=_keep_words, args=(process.stderr, self._words), daemon=True)
        self._reader.start()
        # Runs at interpreter exit, too.
        self._finalizer = weakref.finalize(self, _end, process)

    def ask(self, parts: Sequence[Buffer], *, timeout: float, max_body: int) -> Frame:
        deadline = time.monotonic() + timeout
        limit = f"{timeout:.3g} s"
        for part in parts:
            self._write(part, deadline, limit)
        try:
            start = b"" if self._greeted else self._first_magic(deadline, limit)
            frame = protocol.read_frame(
                lambda count: self._read(count, deadline, limit), max_body=max_body, start=start
            )
        except ProtocolError as error:
            raise Fault(f"its answer is not a frame: {error}") from error
        self._greeted = True
        return frame

    def close(self) -> None:
        if self._process is not None:
            self._finalizer()
            self._process = None

    def last_words(self) -> str:
        if self._process is not None and self._process.poll() is not None:
            self._reader.join(1.0)  # wait for the last line, but not for a child of the worker that holds the pipe open
        return " | ".join(self._words)

    def _write(self, data: Buffer, deadline: float, limit: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        view = memoryview(data).cast("B")
        while len(view):
            self._wait(self._process.stdin.fileno(), select.POLLOUT, deadline, limit)
            try:
                view = view[os.write(self._process.stdin.fileno(), view[: 2**20]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Fault(self._end_of_worker()) from error

    def _read(self, count: int, deadline: float, limit: str) -> bytearray:
        assert self._process is not None and self._process.stdout is not None
        data = bytearray()
        while len(data) < count:
            self._wait(self._process.stdout.fileno(), select.POLLIN, deadline, limit)
            try:
                part = os.read(self._process.stdout.fileno(), min(count - len(data), 2**20))
            except BlockingIOError:
                continue
            if not part:
                raise Fault(self._end_of_worker())
            data += part
        return data

    def _wait(self, descriptor: int, event: int, deadline: float, limit: str) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise Fault(f"no answer within {limit}")

    def _first_magic(self, deadline: float, limit: str) -> bytes:
        """Skip what was printed to stdout before the worker took it over."""
        seen = bytearray()
        while not seen.endswith(protocol.MAGIC):
            if len(seen) > MAX_NOISE:
                raise Fault(f"it printed more than {MAX_NOISE} bytes without a frame")
            seen += self._read(1, deadline, limit)
        noise = bytes(seen[: -len(protocol.MAGIC)]).decode(errors="replace")
        self._words.extend(line for line in noise.splitlines() if line.strip())
        return protocol.MAGIC

    def _end_of_worker(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return "it closed its pipes"
        if code == -signal.SIGKILL:
            return "it was killed (SIGKILL), as happens when memory runs out"
        return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"


def _keep_words(stream, words: collections.deque[str]) -> None:  # type: ignore[no-untyped-def]
    with stream:
        left = b""
        # Read in pieces: a line that never ends must not fill the memory.
        while part := stream.read(4096):
            *lines, left = (left + part).split(b"\n")
            left = left[-4096:]
            for line in lines:
                _keep(line, words)
        _keep(left, words)


def _keep(line: bytes, words: collections.deque[str]) -> None:
    text = line.decode(errors="replace").split("\r")[-1].strip()[:300]
    if text.strip("^~ "):  # a traceback's underlining says nothing by itself
        words.append(text)
        log.debug("worker: %s", text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker with all its children, and close our ends of the pipes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    watchdog.release(process.pid)  # before its number is free again
    process.wait()
