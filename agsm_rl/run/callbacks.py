"""Callbacks of every run: metrics and trackers, the progress bar, a graceful stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self

from rich.text import Text

from agsm_rl.run.display import BAR, RunDisplay, duration, fit, in_lines, make_bar
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.newest_figures import NewestFigures
from agsm_rl.run.records import MetricsFile, append_line
from agsm_rl.run.screen import tell
from agsm_rl.run.stop import Interrupted
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.processes import ProcessLost

LINES = 20
"""Lines that a training writes to a log."""
STOPPING = "stopping soon, with a checkpoint; another Ctrl-C stops at once"
SILENCE = 300.0
"""Seconds after which a log gets a line all the same."""


class MetricsWriter(Callback):
    """Writes one line per step to metrics.jsonl, and sends the same figures to the trackers.

    For runs that learn from their own images, it adds `images`: the number drawn so far by all sources and processes.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.file = MetricsFile(folder.metrics)

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Write the step's figures."""
        counts = [source.images_drawn() for source in trainer.sources.values()]
        if any(count is not None for count in counts):
            metrics["images"] = float(sum(count or 0 for count in counts))
        self.file.add(step, metrics)
        trainer.accelerator.log(metrics, step=step)


class GradientMapWriter(Callback):
    """Writes what each look of the trainer's gradient map saw as a line of gradient_map.jsonl."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.gradient_map

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Write the step's look, if there was one."""
        if trainer.gradient_map is not None and trainer.gradient_map.newest is not None:
            append_line(self.path, {"step": step} | trainer.gradient_map.newest)


class ProgressBar(Callback):
    """Shows the step, losses, rewards, seconds per step and the time left: a bar on a terminal, lines in a log.

    A log gets about twenty lines, and one whenever five minutes have passed since the last one. Its losses are means
    since that line; everything else is the newest value.
    """

    def __init__(
        self, display: RunDisplay, *, steps: int, done: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.display, self.steps, self._first, self._clock = display, steps, done, clock
        self._interval = max(1, steps // LINES)
        self._figures = NewestFigures(step=done)
        self._began = self._told = clock()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._began = self._told = self._clock()
        self._stack.enter_context(self.display.training(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Show the step's figures."""
        self._figures.note(trainer, step, metrics)
        now = self._clock()
        due = step % self._interval == 0 or step in (self._first + 1, self.steps) or now - self._told >= SILENCE
        if due and self.display.prints_lines:
            self._told = now
            parts = [f"step {step}/{self.steps}", *self._figures.shown_losses(averaged=True)]
            tell(self.display.console, "  ".join([*parts, *self._figures.shown_rewards(), *self._speed()]))
            self._figures.reset()

    def lines(self, width: int, *, ascii_only: bool) -> list[Text]:
        """The bar and the figures for a terminal of so many columns."""
        step = self._figures.step
        figures = "  ".join([f"{step}/{self.steps} steps", *self._speed()])
        bar = make_bar(step / self.steps, max(0, min(BAR, width - len(figures) - 12)), ascii_only=ascii_only)
        first = fit(Text.assemble("training  ", bar, "  ", figures), width)
        losses, rewards = self._figures.shown_losses(averaged=False), self._figures.shown_rewards()
        return [first, *in_lines(losses, width), *in_lines(rewards, width)]

    def _speed(self) -> list[str]:
        """Seconds per step, and the time left at the pace so far, evaluations and checkpoints included."""
        made = self._figures.step - self._first
        if not made:
            return []
        left = (self._clock() - self._began) / made * (self.steps - self._figures.step)
        return [f"{self._figures.seconds:.3g} s/step", *([f"{duration(left)} left"] if left else [])]


class GracefulStop(Callback):
    """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second one ends it at once.

    The display says so. An evaluation calls `check` between its batches and is interrupted there. If another process
    was lost, the launcher's SIGTERM is ignored from then on, so that it cannot kill this process before the message is
    printed.
    """

    def __init__(self, display: RunDisplay | None = None) -> None:
        self.display = display
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ProcessLost):
            self._previous[signal.SIGTERM] = signal.SIG_IGN
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if self.display is not None:
            self.display.notice = STOPPING

    def check(self) -> None:
        """Raise Interrupted if a signal has been received."""
        if self.received is not None:
            raise Interrupted

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """After a signal, tell the trainer and later callbacks that the run ends with this step."""
        if self.received is not None:
            trainer.stopping = True
