"""What looks on at a run and keeps its records: metrics, trackers, the progress bar, checkpoints, a graceful stop."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agsm_rl.errors import UserError
from agsm_rl.export.attach import BASE_OPTIONS, find_exports, read_export, save_adapters
from agsm_rl.policy import Policy
from agsm_rl.recipe.schema import Recipe
from agsm_rl.run import checkpoints
from agsm_rl.run.folder import MetricsFile, RunFolder
from agsm_rl.run.score_history import Standing
from agsm_rl.run.stop import Interrupted
from agsm_rl.trainer import Trainer
from agsm_rl.training.processes import ProcessLost


class Metrics:
    """A line a step into metrics.jsonl, and the same figures to the trackers.

    With `seconds`, the step's wall time, and, for runs that learn from their own images, `images`: how many were drawn
    so far, by all sources and processes.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.file = MetricsFile(folder.metrics)

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Write the step's figures."""
        drawn = [source.images_drawn for source in trainer.sources.values() if hasattr(source, "images_drawn")]
        if drawn:
            metrics["images"] = float(sum(drawn))
        self.file.add(step, metrics)
        trainer.accelerator.log(metrics, step=step)

    def on_end(self, trainer: Trainer) -> None:
        """Nothing is left to write."""


class ProgressBar:
    """Step, losses, rewards and the time left: a bar on a terminal, some twenty lines in a log."""

    def __init__(self, console: Console, *, steps: int, done: int, enabled: bool = True) -> None:
        self.console, self.steps = console, steps
        self._interval = max(1, steps // 20)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
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
        figures = shown(metrics)
        self._bar.update(self._task, completed=step, figures=figures)
        if not self.console.is_terminal and (step % self._interval == 0 or step == self.steps):
            self.console.print(f"step {step}/{self.steps}  {figures}", soft_wrap=True, highlight=False)

    def on_end(self, trainer: Trainer) -> None:
        """Leave the last state on the screen."""


def shown(metrics: dict[str, float]) -> str:
    """The losses and rewards among a step's metrics, in short."""
    several = sum(name.endswith("/loss") for name in metrics) > 1
    chosen = [
        (name, value)
        for name, value in metrics.items()
        if (name == "loss" and several) or name.endswith(("/loss", "/reward")) or name == "reward"
    ]
    return "  ".join(f"{name} {value:.4g}" for name, value in chosen)


class Checkpoints:
    """A checkpoint each `checkpoint.every` steps and at the end, and adapter/ as it is in the newest one.

    adapter-best/ holds the adapters of the best evaluation so far, whose checkpoint stays.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, standing: Standing) -> None:
        self.folder, self.recipe, self.standing = folder, recipe, standing
        self._saved: int | None = None
        self._due = False

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Save when it is time, or when the run is being stopped; put off while the step can be no run's end."""
        self._due = self._due or step % self.recipe.checkpoint.every == 0 or trainer.stopping
        if self._due and trainer.can_pause:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the end of the run."""
        if self._saved != trainer.step:
            self.save(trainer)

    def after_evaluation(self, trainer: Trainer) -> None:
        """Save what an evaluation said into the checkpoint of its step, and a new best one in any case."""
        if trainer.step in (self._saved, self.standing.best_step) or trainer.stopping:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of the trainer's step, and the adapters."""
        best = self.standing.best_step
        state = trainer.state_dict() | {"standing": self.standing.state_dict()}
        checkpoints.save(self.folder.checkpoints, trainer.step, state, keep=self.recipe.checkpoint.keep, best=best)
        self._export(trainer.policy, self.folder.adapter, trainer.step)
        if best == trainer.step:
            self._export_best(trainer.policy, best)
        self._saved, self._due = trainer.step, False

    def mend_best(self, trainer: Trainer) -> None:
        """Write adapter-best/ from its checkpoint where a kill came between the two; UserError if that is gone."""
        best = self.standing.best_step
        if best is None or _step_of_export(self.folder.best_adapter) == best:
            return
        state = checkpoints.of_step(self.folder.checkpoints, best)
        if state is None:
            raise UserError(
                f"{self.folder.best_adapter}: the best evaluation so far was at step {best}, but neither its adapters "
                f"nor its checkpoint are there any more; to go on without it: --set checkpoint.best=null"
            )
        now = trainer.policy.state_dict()
        try:
            trainer.policy.load_state_dict(state["policy"])
            self._export_best(trainer.policy, best)
        finally:
            trainer.policy.load_state_dict(now)

    def _export_best(self, policy: Policy, step: int) -> None:
        """The whole folder aside and renamed, so that it never holds adapters of two steps."""
        target = self.folder.best_adapter
        aside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)
        self._export(policy, aside, step)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _export(self, policy: Policy, folder: Path, step: int) -> None:
        backbone = self.recipe.backbone
        metadata = {
            "checkpoint": str(backbone.options.get("checkpoint", "")),
            "backbone": backbone.use,
            "backbone_options": json.dumps({key: backbone.options.get(key) for key in BASE_OPTIONS}),
            "objectives": json.dumps([term.use for term in self.recipe.objectives]),
            "recipe_sha256": hashlib.sha256(self.recipe.to_yaml().encode()).hexdigest(),
            "step": str(step),
            "weights": self.recipe.export,
        }
        with policy.exported(self.recipe.export):
            save_adapters(policy.adapters, folder, metadata=metadata)


def _step_of_export(folder: Path) -> int | None:
    """The step of exported adapters; None where there are none that are whole."""
    try:
        return int(read_export(find_exports(folder)[0])[1]["step"])
    except UserError:
        return None


class GracefulStop:
    """Ctrl-C or SIGTERM ends the run after the step under way, with a checkpoint; a second one ends it at once.

    An evaluation asks between its batches (`check`) and is left there. When another process was lost, the launcher's
    SIGTERM is ignored from then on: it must not come before the message.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ProcessLost):
            self._before[signal.SIGTERM] = signal.SIG_IGN
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def check(self) -> None:
        """Raise Interrupted when a signal has come."""
        if self.received is not None:
            raise Interrupted

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Tell the trainer, and the callbacks after this one, that the run ends here."""
        if self.received is not None:
            trainer.stopping = True

    def on_end(self, trainer: Trainer) -> None:
        """Nothing is left to do."""
