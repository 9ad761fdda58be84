"""The processes of a run: how accelerate is set up for them, what they exchange, and how one ends that is stuck.

Only the adapters' gradients and figures are exchanged, flattened into one message; the frozen backbone is in each.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from agsm_rl.errors import UserError

EXCHANGE_TIMEOUT = timedelta(hours=2)
"""How long an exchange waits. The others wait in one while the first process writes pictures and reports, and shares
of an evaluation take different times; the libraries' default is 10 minutes for NCCL, 30 for gloo. A process that dies
is noticed by the launcher, long before."""
GRACE = 20.0
"""Seconds that a step may go on after a signal. torchrun (and Slurm) send SIGKILL 30 s after SIGTERM."""
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""How accelerate's launcher announces what would shard the model."""

Result = TypeVar("Result")
Value = TypeVar("Value")


class ProcessLost(Exception):
    """An exchange failed: another process ended, or cannot be reached."""


def make_accelerator(**options: Any) -> Accelerator:
    """Accelerate's processes as runs use them; UserError for those that would shard the model."""
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"accelerate is set up for {name}, which is not supported: the backbone is frozen and complete in "
                f"each process, and the adapters are small, so there is nothing to shard. Launch without it "
                f"(`accelerate launch --multi_gpu …`); memory is saved by backbone.dtype, gradient_checkpointing and "
                f"the objectives' *_per_pass"
            )
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=EXCHANGE_TIMEOUT)], **options)


class Processes:
    """This process among accelerate's (interfaces.Shard); each exchange raises ProcessLost where another is gone."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes, in order."""
        return self._exchange(lambda: self.accelerator.gather(values))

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor's mean over the processes, which give tensors of the same shapes; one message per dtype."""
        if self.count == 1 or not values:
            return list(values)
        means: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(value.dtype for value in values):
            chosen = [index for index, value in enumerate(values) if value.dtype == dtype]
            flat = torch.cat([values[index].reshape(-1) for index in chosen])
            mean = self._exchange(lambda flat=flat: self.accelerator.reduce(flat, "mean"))  # type: ignore[misc]
            for index, part in zip(chosen, mean.split([values[index].numel() for index in chosen]), strict=True):
                means[index] = part.reshape(values[index].shape)
        return [means[index] for index in range(len(values))]

    def gather_objects(self, values: list[Value]) -> list[Value]:
        """The values of all processes, in order; they are pickled on the way."""
        if self.count == 1:
            return values
        gathered: list[Value] = self._exchange(lambda: gather_object(values))
        return gathered

    def numbers(self, number: float) -> Tensor:
        """One number from each process, [count], in order."""
        return self.gather(torch.tensor([number], device=self.accelerator.device))

    def names(self, names: Iterable[str]) -> list[str]:
        """The names that any process has, sorted, each once."""
        text = torch.tensor(list(json.dumps(sorted(names)).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self.numbers(float(len(text))).tolist()]
        padded = torch.nn.functional.pad(text, (0, max(lengths) - len(text))).to(self.accelerator.device)
        rows = zip(self.gather(padded[None]).cpu(), lengths, strict=True)
        return sorted({name for row, length in rows for name in json.loads(bytes(row[:length].tolist()))})

    def wait(self) -> None:
        """Wait for all processes."""
        self._exchange(self.accelerator.wait_for_everyone)

    def _exchange(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except RuntimeError as error:  # gloo raises no other; NCCL's DistBackendError is one
            if self.count == 1:
                raise
            raise ProcessLost(f"it cannot be reached any more ({_in_short(error)})") from error


def _in_short(error: Exception) -> str:
    """gloo's message begins with the place in its own source and ends with advice about itself."""
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    return words.rpartition("] ")[2].partition(". This is typically")[0].rstrip(". ")[:200]


class EndWhenStuck:
    """Within the block, a process that got SIGTERM or SIGINT and is still running `grace` seconds later is killed.

    A main thread that waits for a lost process in an exchange (NCCL's, say) runs no signal handler, so a thread does
    it: it prints `message(number)` (None: nothing) and ends the process with the shell's 128 + number.
    """

    def __init__(self, message: Callable[[int], str | None], *, grace: float = GRACE) -> None:
        self._message, self._grace = message, grace
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="end_when_stuck", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        signal.set_wakeup_fd(self._before)
        self._write.close()  # the thread reads the end of it

    def _watch(self) -> None:
        with self._read:
            number = self._next_signal()
        if number is None or self._done.wait(self._grace):
            return
        message = self._message(number)
        if message is not None:
            print(f"agsm-rl: {message}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    def _next_signal(self) -> int | None:
        while got := self._read.recv(1):
            if got[0] in (signal.SIGTERM, signal.SIGINT):
                return got[0]
        return None
