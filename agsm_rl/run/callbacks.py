"""Callbacks of every run: metrics and trackers, the progress bar, a graceful stop."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console

from agsm_rl.run.folder import RunFolder
from agsm_rl.run.records import MetricsFile
from agsm_rl.run.screen import make_progress, tell
from agsm_rl.run.stop import Interrupted
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.processes import ProcessLost


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


class ProgressBar(Callback):
    """Shows the step, losses, rewards and remaining time: a bar on a terminal, about twenty lines in a log."""

    def __init__(self, console: Console, *, steps: int, done: int, enabled: bool = True) -> None:
        self.console, self.steps = console, steps
        self._interval = max(1, steps // 20)
        self._bar = make_progress(console, enabled=enabled)
        self._task = self._bar.add_task("training", total=steps, completed=done, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Show the step's figures."""
        figures = brief(metrics)
        self._bar.update(self._task, completed=step, figures=figures)
        if not self.console.is_terminal and (step % self._interval == 0 or step == self.steps):
            tell(self.console, f"step {step}/{self.steps}  {figures}")


def brief(metrics: dict[str, float]) -> str:
    """The losses and rewards among a step's metrics, on one line."""
    has_several_terms = sum(name.endswith("/loss") for name in metrics) > 1
    chosen = [
        (name, value)
        for name, value in metrics.items()
        if (name == "loss" and has_several_terms) or name.endswith(("/loss", "/reward")) or name == "reward"
    ]
    return "  ".join(f"{name} {value:.4g}" for name, value in chosen)


class GracefulStop(Callback):
    """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second one ends it at once.

    An evaluation calls `check` between its batches and is interrupted there. If another process was lost, the
    launcher's SIGTERM is ignored from then on, so that it cannot kill this process before the message is printed.
    """

    def __init__(self) -> None:
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

    def check(self) -> None:
        """Raise Interrupted if a signal has been received."""
        if self.received is not None:
            raise Interrupted

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """After a signal, tell the trainer and later callbacks that the run ends with this step."""
        if self.received is not None:
            trainer.stopping = True
