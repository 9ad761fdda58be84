"""A run from a recipe to its folder: build, lock, train, keep, compare. `agsm-rl train` is this and a few messages."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.files import write_text
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.resolve import Parts
from agsm_rl.run import checkpoints
from agsm_rl.run.agreement import agreements, to_json
from agsm_rl.run.callbacks import GracefulStop, MetricsWriter, ProgressBar
from agsm_rl.run.evaluation import Evaluation
from agsm_rl.run.folder import MetricsFile, RunFolder
from agsm_rl.run.sample_grids import SampleGrids
from agsm_rl.run.screen import make_console, tell
from agsm_rl.run.stop import Interrupted, Lost, Stopped
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.anomalies import WentWrong
from agsm_rl.training.processes import GRACE, EndWhenStuck, ProcessLost, make_accelerator


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
    recipe or the folder cannot be used, Stopped after a signal, and Lost where another process of the run is gone.
    """
    console = console or make_console(stderr=True)
    folder = RunFolder(run_dir or _shared(lambda: default_folder(where)))
    accelerator = make_accelerator(
        log_with=recipe.track or None,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.path / "logs")),
    )
    main, lost = accelerator.is_main_process, False
    try:
        if main:
            folder.check(recipe, resume=resume, allow_imports=allow_imports)
        fresh = not (resume and any(folder.checkpoints.glob("*.pt")))
        trainer = build_trainer(recipe, where=where, allow_imports=allow_imports, accelerator=accelerator, fresh=fresh)
        if main:
            folder.open(recipe)
        try:
            trainer.processes.wait()
            standing = _continue(trainer, folder, console if main else None) if resume else None
            if main and trainer.processes.count > 1:
                tell(console, f"{trainer.processes.count} processes")
            _start_trackers(accelerator, recipe)
            trainer.callbacks = list(callbacks)
            with GracefulStop() as stop, _ended_when_stuck(trainer, folder):
                evaluation = Evaluation(
                    folder, recipe, Parts(where=where, allow_imports=allow_imports), console, check=stop.check
                )
                if main and resume:
                    evaluation.resume(trainer, standing)
                _run(trainer, recipe, folder, evaluation, stop, console, evaluate=evaluate)
        except ProcessLost as error:
            raise _lost(trainer, folder, f"another process ended, or {error}") from error
        except OSError as error:
            raise _failed(folder, trainer, error) from error
        return folder.path
    except Lost:
        lost = True
        raise
    except UserError:
        if main:
            folder.discard_unused()
        raise
    finally:
        # On a full disk the trackers' last lines are lost too; the run's own error says why.
        with suppress(OSError):
            if lost:  # taking the group down in order may wait for the process that is gone
                for tracker in accelerator.trackers:
                    tracker.finish()
            else:
                accelerator.end_training()
        if main:
            folder.close()


def _run(
    trainer: Trainer,
    recipe: Recipe,
    folder: RunFolder,
    evaluation: Evaluation,
    stop: GracefulStop,
    console: Console,
    *,
    evaluate: bool,
) -> None:
    """Train and compare, on all processes; Stopped after a signal, ProcessLost where another process is gone."""
    main = trainer.accelerator.is_main_process
    try:
        _train(trainer, recipe, folder, evaluation, stop, console)
        # A signal may have come to one process only; and the checkpoint is to be written before any of them ends.
        told = trainer.processes.numbers(float(stop.received is not None)).any()
        if told and trainer.step < recipe.steps:
            raise Stopped(folder.recipe, trainer.step, stop.received or signal.SIGTERM, tells=main)
        finished = not main or _finish(trainer, recipe, folder, evaluation, console, evaluate=evaluate)
        if not trainer.processes.numbers(float(finished)).all():
            during = ", the last, in the evaluation: the steps are kept, the evaluation is made up for"
            raise Stopped(folder.recipe, trainer.step, stop.received or signal.SIGTERM, during=during, tells=main)
    except KeyboardInterrupt as error:
        raise Stopped(folder.recipe, trainer.step, stop.received or signal.SIGINT, tells=main) from error


def _train(
    trainer: Trainer, recipe: Recipe, folder: RunFolder, evaluation: Evaluation, stop: GracefulStop, console: Console
) -> None:
    main = trainer.accelerator.is_main_process
    grids = SampleGrids(folder, recipe)
    trainer.callbacks = [stop, *trainer.callbacks]
    with ProgressBar(console, steps=recipe.steps, done=trainer.step, enabled=main) as bar:
        if main:
            # Metrics before the checkpoint: a run continued from it has all its lines. The checkpoint before what
            # takes long: a kill in an evaluation loses nothing, it is made up for.
            trainer.callbacks += [MetricsWriter(folder), evaluation.events, bar, evaluation.checkpoints]
            trainer.callbacks += [grids, evaluation]
            grids.resume(trainer)
        try:
            trainer.train()
        except WentWrong as error:
            if main:
                evaluation.events.write(error.event)
            raise


def _finish(
    trainer: Trainer, recipe: Recipe, folder: RunFolder, evaluation: Evaluation, console: Console, *, evaluate: bool
) -> bool:
    """Base against trained, whether the terms agreed, and the report; False where a signal cut it off."""
    if evaluate and recipe.evaluate is not None:
        try:
            evaluation.finish(trainer)
        except Interrupted:
            return False
    elif evaluate:
        SampleGrids(folder, recipe).write_before_after(trainer)
    _tell_agreement(folder)
    if evaluate and (recipe.evaluate is None or folder.eval.exists()):
        _write_report(folder, console)
    return True


def _lost(trainer: Trainer, folder: RunFolder, cause: str) -> Lost:
    """The end of this process for want of another; two a machine tell, because one of them may be what was lost."""
    good = [name for name, whole in checkpoints.verdicts(folder.checkpoints).items() if whole]
    return Lost(
        folder.recipe,
        trainer.step,
        str(trainer.processes),
        cause,
        checkpoint=folder.checkpoints / good[0] if good else None,
        tells=trainer.accelerator.local_process_index < 2,
    )


def _ended_when_stuck(trainer: Trainer, folder: RunFolder) -> AbstractContextManager[Any]:
    """Where there are several processes, one that waits for another after a signal is ended in time to say so."""
    if trainer.processes.count == 1:
        return nullcontext()

    def message(number: int) -> str | None:
        name = signal.Signals(number).name
        lost = _lost(
            trainer,
            folder,
            f"{GRACE:.0f} s after {name} its step has not ended, so it waits for a process that is gone (or its steps "
            "take longer than a launcher waits)",
        )
        return str(lost) if lost.tells else None

    return EndWhenStuck(message)


def _failed(folder: RunFolder, trainer: Trainer, error: OSError) -> UserError:
    """What a full disk, a folder that vanished or a file that cannot be read any more means for the run."""
    good = [name for name, whole in checkpoints.verdicts(folder.checkpoints).items() if whole]
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
    out = make_console()
    for one in found:
        tell(out, str(one))
    if found and folder.eval.exists():
        content = json.loads(folder.eval.read_text(encoding="utf-8")) | {"agreement": to_json(found)}
        write_text(folder.eval, json.dumps(content, indent=1) + "\n")


def _write_report(folder: RunFolder, console: Console) -> None:
    """report.html in the run folder; a run whose report fails is whole all the same, and says so."""
    from agsm_rl.report.page import write_report

    try:
        write_report([folder.path], folder.report)
    except Exception as error:  # whatever it is, hours of training must not end as a failure for it
        tell(
            console,
            f"report.html was not written ({type(error).__name__}: {error}); all else is. To try again: agsm-rl report "
            f"{folder.path}",
        )


def _continue(trainer: Trainer, folder: RunFolder, console: Console | None) -> dict[str, Any] | None:
    """Load the newest good checkpoint, if there is one, and forget the metrics after it; the evaluations' standing."""
    found = checkpoints.newest(folder.checkpoints)
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
    _check_together(trainer, folder)
    if console is not None:
        for file in (folder.metrics, folder.evaluations, folder.events):
            MetricsFile(file).cut(step)
        tell(
            console,
            f"continuing {folder.path} after step {step}" if step else f"{folder.path}: no checkpoint yet, starting",
        )
    return standing


def _check_together(trainer: Trainer, folder: RunFolder) -> None:
    """UserError, in all processes alike, where some found another checkpoint than the first one did."""
    steps = trainer.processes.numbers(float(trainer.step)).tolist()
    if len(set(steps)) > 1:
        other = next(index for index, step in enumerate(steps) if step != steps[0])
        raise UserError(
            f"{folder.path}: process 0 continues after step {steps[0]:.0f}, process {other} after step "
            f"{steps[other]:.0f}: to go on, all machines must see the same run folder (a shared file system, or a copy "
            "of it on each)"
        )


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
    make_accelerator()  # before anything is exchanged, which would set the processes up with other timeouts
    values = [str(make())]
    broadcast_object_list(values)
    return Path(values[0])
