"""A run from a recipe to its folder: build, lock, train, keep, compare. `agsm-rl train` is this and a few messages."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from rich.console import Console

from agsm_rl import checkpoint
from agsm_rl.agreement import agreements, to_json
from agsm_rl.build import build_trainer
from agsm_rl.callbacks import GracefulStop, Metrics, ProgressBar
from agsm_rl.errors import UserError
from agsm_rl.recipe import Recipe
from agsm_rl.resolve import Parts
from agsm_rl.run_folder import MetricsFile, RunFolder, write_text
from agsm_rl.stop import Stopped
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.watch import WentWrong
from agsm_rl.watching import Evaluation, SampleGrids


def train(
    recipe: Recipe,
    run_dir: Path | None = None,
    *,
    resume: bool = False,
    where: str = "recipe",
    allow_imports: Collection[str] = (),
    console: Console | None = None,
    callbacks: Sequence[Callback] = (),
    evaluate: bool = True,
) -> Path:
    """Train a recipe (from `Recipe.from_yaml`) in a run folder, and return the folder.

    `run_dir` None: runs/<recipe's name>-<time>. `callbacks` look on too, and may stop the run. Without `evaluate`,
    nothing is drawn after the last step: whoever calls evaluates. Raises UserError before anything is written when the
    recipe or the folder cannot be used, and Stopped after a signal.
    """
    console = console or Console(stderr=True)
    folder = RunFolder(run_dir or _shared(lambda: default_folder(where)))
    accelerator = Accelerator(
        log_with=recipe.track or None,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.path / "logs")),
    )
    main = accelerator.is_main_process
    try:
        if main:
            folder.check(recipe, resume=resume, allow_imports=allow_imports)
        fresh = not (resume and any(folder.checkpoints.glob("*.pt")))
        trainer = build_trainer(recipe, where=where, allow_imports=allow_imports, accelerator=accelerator, fresh=fresh)
        if main:
            folder.open(recipe)
        accelerator.wait_for_everyone()
        standing = _continue(trainer, folder, console if main else None) if resume else None
        if main and accelerator.num_processes > 1:
            console.print(f"{accelerator.num_processes} processes", highlight=False)
        try:
            _start_trackers(accelerator, recipe)
            trainer.callbacks = list(callbacks)
            evaluation = Evaluation(folder, recipe, Parts(where=where, allow_imports=allow_imports), console)
            if main and resume:
                evaluation.resume(trainer, standing)
            _run(trainer, recipe, folder, evaluation, console, evaluate=evaluate)
        except OSError as error:
            raise _failed(folder, trainer, error) from error
        return folder.path
    except UserError:
        if main:
            folder.discard_unused()
        raise
    finally:
        # On a full disk the trackers' last lines are lost too; the run's own error says why.
        with suppress(OSError):
            accelerator.end_training()
        if main:
            folder.close()


def _run(
    trainer: Trainer, recipe: Recipe, folder: RunFolder, evaluation: Evaluation, console: Console, *, evaluate: bool
) -> None:
    main = trainer.accelerator.is_main_process
    grids = SampleGrids(folder, recipe)
    with GracefulStop() as stop:
        trainer.callbacks = [stop, *trainer.callbacks]
        with ProgressBar(console, steps=recipe.steps, done=trainer.step, enabled=main) as bar:
            if main:
                # Metrics before the checkpoint: a run continued from it has all its lines. The checkpoint before what
                # takes long: a kill in an evaluation loses nothing, it is made up for.
                trainer.callbacks += [Metrics(folder), evaluation.events, bar, evaluation.checkpoints]
                trainer.callbacks += [grids, evaluation]
                grids.resume(trainer)
            try:
                trainer.train()
            except WentWrong as error:
                if main:
                    evaluation.events.write(error.event)
                raise
    if stop.received is not None and trainer.step < recipe.steps:
        raise Stopped(folder.recipe, trainer.step, stop.received)
    try:
        if main and evaluate and recipe.evaluate is not None:
            evaluation.finish(trainer)
        elif main and evaluate:
            grids.write_before_after(trainer)
    except KeyboardInterrupt as error:
        raise Stopped(folder.recipe, trainer.step, signal.SIGINT) from error
    if main:
        _tell_agreement(folder)
    if main and evaluate:
        if recipe.evaluate is None:
            console.print("no report.html: the recipe has no `evaluate:`", highlight=False)
        elif folder.eval.exists():
            _write_report(folder, console)
    trainer.accelerator.wait_for_everyone()


def _failed(folder: RunFolder, trainer: Trainer, error: OSError) -> UserError:
    """What a full disk, a folder that vanished or a file that cannot be read any more means for the run."""
    good = [name for name, whole in checkpoint.verdicts(folder.checkpoints).items() if whole]
    left = (
        f"The newest good checkpoint is {folder.checkpoints / good[0]}; when that is mended, go on with "
        f"agsm-rl train {folder.recipe} --resume"
        if good
        else f"There is no checkpoint in {folder.checkpoints}; when that is mended, start again"
    )
    return UserError(f"{folder.path}: the run ended after step {trainer.step}: {error}. {left}.")


def _tell_agreement(folder: RunFolder) -> None:
    """Say whether the terms helped or fought each other, on the screen and in eval.json."""
    found = agreements(folder.metrics)
    out = Console()
    for one in found:
        out.print(str(one), highlight=False)
    if found and folder.eval.exists():
        content = json.loads(folder.eval.read_text(encoding="utf-8")) | {"agreement": to_json(found)}
        write_text(folder.eval, json.dumps(content, indent=1) + "\n")


def _write_report(folder: RunFolder, console: Console) -> None:
    """report.html in the run folder; a run whose report fails is whole all the same, and says so."""
    from agsm_rl.report.page import write_report

    try:
        write_report([folder.path], folder.report)
    except Exception as error:  # whatever it is, hours of training must not end as a failure for it
        console.print(
            f"report.html was not written ({type(error).__name__}: {error}); all else is. To try again: agsm-rl report "
            f"{folder.path}",
            highlight=False,
            markup=False,
        )


def _continue(trainer: Trainer, folder: RunFolder, console: Console | None) -> dict[str, Any] | None:
    """Load the newest good checkpoint, if there is one, and forget the metrics after it; the evaluations' standing."""
    found = checkpoint.newest(folder.checkpoints)
    step, standing = 0, None
    if found is not None:
        step, state = found
        standing = state.get("standing")  # checkpoints of earlier versions have none
        try:
            trainer.load_state_dict(state)
        except UserError as error:
            raise UserError(f"{folder.checkpoints}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{folder.checkpoints}: that of step {step} is no checkpoint of this program and recipe "
                f"({type(error).__name__}: {error}); delete it to go on from an older one"
            ) from error
    if console is not None:
        for file in (folder.metrics, folder.evaluations, folder.events):
            MetricsFile(file).cut(step)
        console.print(
            f"continuing {folder.path} after step {step}" if step else f"{folder.path}: no checkpoint yet, starting",
            soft_wrap=True,
        )
    return standing


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
