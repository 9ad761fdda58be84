"""A reward behind a link: greet, ask, check the answer, retry after a fault, and report what is wrong in the end.

A batch gets all of its scores, checked, or a UserError. No score is ever made up.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from agsm_rl_rewards.worker_side.agsm_rl_worker import PROTOCOL, Array, Buffer, Frame, encode
from torch import Tensor

from agsm_rl.errors import UserError

LONGEST_BACKOFF = 60.0
MAX_ANSWER = 2**20
"""Bytes of an answer's arrays; four per image are needed."""


class Fault(Exception):
    """A failed attempt that may be repeated; if `broken`, only on a link that is opened again."""

    def __init__(self, message: str, *, broken: bool = True) -> None:
        super().__init__(message)
        self.broken = broken


class Link(Protocol):
    """A connection to a worker. `ask` raises Fault if there is no complete answer in time."""

    @property
    def is_open(self) -> bool: ...

    def open(self) -> None:
        """Start or find the worker; UserError for problems that a retry cannot fix."""
        ...

    def ask(self, parts: Sequence[Buffer], *, timeout: float, max_body: int) -> Frame:
        """Send a frame and return the answer."""
        ...

    def close(self) -> None:
        """End the worker, whatever it is doing; further calls do nothing."""
        ...

    def last_words(self) -> str:
        """What the worker printed last, for messages."""
        ...


class RemoteReward:
    """Scores [B] of images [B, 3, H, W] in [0, 1] by the reward at the other end of a link.

    The worker is started at the first batch, not before. Raises UserError when the tries are used up, or at once if the
    worker refuses (a wrong option, missing weights).

    Args:
        timeout: Seconds for the scores of one batch.
        start_timeout: Seconds for the worker to load what it needs.
        retries: How often a batch is tried again after a crash, a hang or an invalid answer.
        backoff: Seconds before the first further try, doubled each time, one minute at most.
    """

    differentiable = False
    elsewhere = True
    takes_metadata = True

    def __init__(
        self,
        link: Link,
        *,
        name: str,
        options: dict[str, Any] | None = None,
        timeout: float,
        start_timeout: float,
        retries: int,
        backoff: float,
    ) -> None:
        for key, value in {"timeout": timeout, "start_timeout": start_timeout}.items():
            if value <= 0:
                raise UserError(f"reward '{name}': {key} is in seconds and must be more than 0; got {value}")
        if retries < 0 or backoff < 0:
            raise UserError(f"reward '{name}': retries and backoff must be 0 or more; got {retries} and {backoff}")
        self.name = name
        self.range: tuple[float, float] = (-math.inf, math.inf)
        self.packages: dict[str, str] = {}
        """Package versions that the worker reports once it has started."""
        self._link, self._options = link, options or {}
        self._timeout, self._start_timeout, self._retries, self._backoff = timeout, start_timeout, retries, backoff
        self._images = "float32"
        self._wants_metadata = False
        self._asked, self._greeted = 0, False
        self._lock = threading.Lock()

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [B]; `metadata`, the other columns of each prompt's row, is sent only if the worker asks for it."""
        check_images(self.name, images, prompts)
        with self._lock:
            return self._with_retries(images, prompts, metadata).to(images.device)

    def close(self) -> None:
        """End the worker; a later batch starts it again."""
        self._link.close()

    def _with_retries(self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None) -> Tensor:
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(self._backoff * 2 ** (attempt - 1), LONGEST_BACKOFF))
            try:
                if not self._link.is_open:
                    self._greet()
                return self._score(images, prompts, metadata)
            except Fault as fault:
                last, words = fault, self._link.last_words()
                if fault.broken or not self._greeted:
                    self._link.close()
            except BaseException:  # Ctrl-C before the answer: the next question must not get it
                self._link.close()
                raise
        tries = "1 try" if self._retries == 0 else f"{self._retries + 1} tries"
        said = f" It printed last: {words}" if words and str(last) not in words else ""
        raise UserError(
            f"reward '{self.name}': no scores after {tries}; at last: {str(last).rstrip(' .')}.{said}"
        ) from last

    def _greet(self) -> None:
        """Start the worker and agree on the protocol version."""
        self._greeted = False
        self._link.open()
        greeting = encode({"op": "hello", "protocol": [PROTOCOL], "options": self._options})
        header = self._answer(self._link.ask(greeting, timeout=self._start_timeout, max_body=0), "hello").header
        if header.get("protocol") != PROTOCOL:
            raise UserError(
                f"reward '{self.name}': its worker speaks version {header.get('protocol')} of the protocol, this is "
                f"version {PROTOCOL}; install the same agsm-rl on both sides."
            )
        self._images = "uint8" if header.get("images") == "uint8" else "float32"
        self._wants_metadata = header.get("metadata") is True
        self.range, self.packages = _range(header.get("range")), dict(header.get("packages") or {})
        self._greeted = True

    def _score(self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None) -> Tensor:
        self._asked += 1
        header: dict[str, Any] = {"op": "score", "id": self._asked, "prompts": prompts}
        if self._wants_metadata and metadata is not None:
            header["metadata"] = [dict(row) for row in metadata]
        try:
            question = encode(header, [as_array(images, self._images)])
        except (TypeError, ValueError) as error:
            raise UserError(f"reward '{self.name}': a prompt's metadata cannot be sent as JSON: {error}") from error
        frame = self._answer(self._link.ask(question, timeout=self._timeout, max_body=MAX_ANSWER), "scores")
        if frame.header.get("id") != self._asked:
            raise Fault(f"it answered question {frame.header.get('id')} where {self._asked} was asked")
        return self._checked(frame.arrays.get("scores"), prompts)

    def _answer(self, frame: Frame, wanted: str) -> Frame:
        op, message = frame.header["op"], str(frame.header.get("message", ""))
        if op == "refused":
            self._link.close()
            raise UserError(f"reward '{self.name}': {message}")
        if op == "error":
            # A worker that fails while it starts, or ran out of memory, must be started again; else the next batch may
            # well succeed.
            raise Fault(message, broken=wanted == "hello" or frame.header.get("spent") is True)
        if op != wanted:
            raise Fault(f"it answered with '{op[:40]}' where '{wanted}' was expected")
        return frame

    def _checked(self, scores: Array | None, prompts: list[str]) -> Tensor:
        if scores is None or scores.dtype != "float32" or scores.shape != (len(prompts),):
            got = None if scores is None else (scores.dtype, scores.shape)
            raise Fault(f"it answered with {got}, but one float32 per image is needed: shape ({len(prompts)},)")
        received = torch.frombuffer(bytearray(scores.data), dtype=torch.float32)
        low, high = self.range
        slack = 1e-4 * max([1.0, *(abs(end) for end in self.range if math.isfinite(end))])
        good = torch.isfinite(received) & (received >= low - slack) & (received <= high + slack)
        if not good.all():
            bad = int((~good).nonzero()[0])
            score = float(received[bad])
            outside = f", outside of its range {low:g} to {high:g}," if math.isfinite(score) else ""
            raise Fault(f"its score is {score}{outside} for the prompt '{prompts[bad]}'", broken=False)
        return received


def check_images(name: str, images: Tensor, prompts: list[str]) -> None:
    """UserError unless these are finite images [B, 3, H, W] with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or len(images) != len(prompts):
        raise UserError(
            f"reward '{name}': it needs images [B, 3, H, W] with one prompt each; got {tuple(images.shape)} and "
            f"{len(prompts)} prompts"
        )
    if not torch.isfinite(images).all():
        raise UserError(f"reward '{name}': the images contain values that are not finite")


def as_array(images: Tensor, dtype: str) -> Array:
    """Images as the worker needs them: float32 as they are, or 8 bits per channel."""
    pixels = images.detach().float()
    pixels = (pixels.clamp(0, 1) * 255).round().byte() if dtype == "uint8" else pixels
    values = pixels.cpu().contiguous().numpy()
    return Array("images", dtype, tuple(images.shape), memoryview(values.reshape(-1)).cast("B"))


def _range(ends: Any) -> tuple[float, float]:
    if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, int | float | None) for end in ends):
        raise Fault("it did not state the range of its scores")
    low, high = ends
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))
