"""A run from a recipe to its folder: build, lock, train, keep, compare. `agsm-rl train` is this and a few messages."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console

from agsm_rl import checkpoint
from agsm_rl.build import build_trainer
from agsm_rl.callbacks import Checkpoints, GracefulStop, Metrics, ProgressBar
from agsm_rl.errors import UserError
from agsm_rl.recipe import Recipe
from agsm_rl.run_folder import MetricsFile, RunFolder
from agsm_rl.trainer import Trainer
from agsm_rl.watching import Comparison, SampleGrids


class Stopped(Exception):
    """The run was stopped by a signal after `step` steps; it can be continued. `exit_code` is the shell's, 128 + signal."""

    def __init__(self, folder: RunFolder, step: int, number: int) -> None:
        self.exit_code = 128 + number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}. To continue: agsm-rl train {folder.recipe} --resume")


def train(
    recipe: Recipe,
    run_dir: Path | None = None,
    *,
    resume: bool = False,
    where: str = "recipe",
    allow_imports: Collection[str] = (),
    console: Console | None = None,
) -> Path:
    """Train a recipe (from `Recipe.from_yaml`) in a run folder, and return the folder.

    `run_dir` None: runs/<recipe's name>-<time>. Raises UserError before anything is written when the recipe or the folder
    cannot be used, and Stopped after a signal.
    """
    console = console or Console(stderr=True)
    folder = RunFolder(run_dir or _shared(lambda: default_folder(where)))
    accelerator = Accelerator(log_with=recipe.track or None, project_dir=str(folder.path))
    main = accelerator.is_main_process
    try:
        if main:
            folder.check(recipe, resume=resume, allow_imports=allow_imports)
        trainer = build_trainer(recipe, where=where, allow_imports=allow_imports, accelerator=accelerator)
        if main:
            folder.open(recipe)
        accelerator.wait_for_everyone()
        if resume:
            _continue(trainer, folder, console if main else None)
        _start_trackers(accelerator, recipe)
        _run(trainer, recipe, folder, console)
        return folder.path
    finally:
        accelerator.end_training()
        if main:
            folder.close()


def _run(trainer: Trainer, recipe: Recipe, folder: RunFolder, console: Console) -> None:
    with GracefulStop() as stop:
        trainer.callbacks = [stop]
        if trainer.accelerator.is_main_process:
            comparison = Comparison(folder, recipe, console)
            trainer.callbacks += [
                Metrics(folder),
                Checkpoints(folder, recipe),
                SampleGrids(folder, recipe),
                comparison,
                ProgressBar(console, steps=recipe.steps, done=trainer.step),
            ]
        trainer.train()
    if stop.received is not None and trainer.step < recipe.steps:
        raise Stopped(folder, trainer.step, stop.received)
    if trainer.accelerator.is_main_process:
        comparison.finish(trainer)
    trainer.accelerator.wait_for_everyone()


def _continue(trainer: Trainer, folder: RunFolder, console: Console | None) -> None:
    """Load the newest good checkpoint, if there is one, and forget the metrics after it."""
    found = checkpoint.newest(folder.checkpoints)
    step = 0
    if found is not None:
        step, state = found
        try:
            trainer.load_state_dict(state)
        except UserError as error:
            raise UserError(f"{folder.checkpoints}: {error}") from error
    if console is not None:
        MetricsFile(folder.metrics).cut(step)
        console.print(f"continuing {folder.path} after step {step}" if step else f"{folder.path}: no checkpoint yet, starting")


def _start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Begin tracking under the recipe's plain settings."""
    if recipe.track:
        settings = {"seed": recipe.seed, "steps": recipe.steps, "recipe": recipe.to_yaml()}
        accelerator.init_trackers("agsm-rl", config=settings)


def default_folder(where: str) -> Path:
    """runs/<recipe's name>-<time>, one that does not exist."""
    name = f"{Path(where).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = Path("runs") / name, 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{name}-{count}"
    return path


def _shared(make: Callable[[], Path]) -> Path:
    """What the first process makes, in all processes: their clocks may differ."""
    values = [str(make())]
    broadcast_object_list(values)
    return Path(values[0])
