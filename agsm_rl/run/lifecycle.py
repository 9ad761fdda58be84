"""A run from a recipe to its folder: build, lock, train, keep, compare. `agsm-rl train` is this and a few messages."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.measured import entries_of
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run import checkpoints
from agsm_rl.run.agreement import agreements
from agsm_rl.run.callbacks import GracefulStop, GradientMapWriter, MetricsWriter, ProgressBar
from agsm_rl.run.display import RunDisplay
from agsm_rl.run.evaluation import Evaluator, prepare_suites
from agsm_rl.run.failures import ended_when_stuck, failures_named
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.phases import phases, story
from agsm_rl.run.records import MetricsFile, read_lines
from agsm_rl.run.sample_grids import SampleGrids
from agsm_rl.run.screen import make_console, tell
from agsm_rl.run.stop import Interrupted, Lost, Stopped
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.anomalies import WentWrong
from agsm_rl.training.processes import make_accelerator
from agsm_rl.training.stages import shown_by


def train(
    recipe: Recipe,
    run_dir: Path | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Sequence[Callback] = (),
    evaluate: bool = True,
    evaluate_later: Sequence[Evaluate] = (),
) -> Path:
    """Train a recipe (from `Recipe.from_yaml`) in a run folder, and return the folder.

    Args:
        recipe: What to train.
        run_dir: The run folder. None is runs/<recipe's name>-<time>.
        resume: Continue the run in `run_dir` from its newest good checkpoint.
        console: Where progress and summaries are printed. None is stderr.
        callbacks: Called after each step, before our own callbacks; they may set `trainer.stopping`.
        evaluate: Compare base and trained, or draw samples, after the last step. False leaves that to the caller.
        evaluate_later: Evaluations that the caller makes afterwards: what judges them is tried before the first step.

    Raises UserError before anything is written when the recipe or the folder cannot be used, Stopped after a signal,
    and Lost when another process of the run is gone.
    """
    console = console or make_console(stderr=True)
    folder = RunFolder(run_dir or _shared(lambda: _default_folder(recipe.parts.where)), reserved=run_dir is None)
    accelerator = make_accelerator(
        log_with=recipe.track or None,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.path / "logs")),
    )
    with (
        _closed_at_end(folder, accelerator),
        RunDisplay(console, enabled=accelerator.is_main_process) as display,
        shown_by(display),
    ):
        if accelerator.is_main_process:
            folder.check(recipe, resume=resume)
        grids = SampleGrids(folder, recipe)  # its prompts are read before anything is loaded
        fresh = not (resume and checkpoints.steps_in(folder.checkpoints))
        trainer = build_trainer(recipe, accelerator=accelerator, fresh=fresh)
        if accelerator.is_main_process:
            folder.open(recipe)
        with failures_named(folder, trainer):
            trainer.processes.wait()
            history = _load_newest(trainer, folder, console) if resume else None
            if accelerator.is_main_process and trainer.processes.count > 1:
                tell(console, f"{trainer.processes.count} processes")
            _start_trackers(accelerator, recipe)
            trainer.callbacks = list(callbacks)
            with GracefulStop(display) as stop, ended_when_stuck(folder, trainer):
                is_main = accelerator.is_main_process
                evaluator = Evaluator(folder, recipe, console, check=stop.check, is_main=is_main)
                if evaluate:
                    evaluator.prepare(trainer.policy.backbone)
                    evaluator.encode_prompts(trainer)
                for options in evaluate_later:
                    prepare_suites(entries_of(options, recipe.parts), options, trainer.policy.backbone)
                if resume:
                    evaluator.resume(trainer, history)
                _Run(recipe, folder, trainer, evaluator, grids, stop, display).run(evaluate=evaluate)
    return folder.path


@contextmanager
def _closed_at_end(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """After the block, the trackers are finished and the folder is free; one in which nothing was kept is removed."""
    processes_left = True
    try:
        yield
    except Lost:
        processes_left = False
        raise
    except UserError:
        if accelerator.is_main_process:
            folder.discard_unused()
        raise
    finally:
        # On a full disk the trackers' last lines are lost too; the run's own error says why.
        with suppress(OSError):
            if processes_left:
                accelerator.end_training()
            else:  # taking the process group down would wait for the process that is gone
                for tracker in accelerator.trackers:
                    tracker.finish()
        if accelerator.is_main_process:
            folder.close()


@dataclass
class _Run:
    """A run whose folder is open: its steps, and what follows the last one. The same on all processes."""

    recipe: Recipe
    folder: RunFolder
    trainer: Trainer
    evaluator: Evaluator
    grids: SampleGrids
    stop: GracefulStop
    display: RunDisplay

    @property
    def is_main(self) -> bool:
        return bool(self.trainer.accelerator.is_main_process)

    def run(self, *, evaluate: bool) -> None:
        """Train and compare; Stopped after a signal, ProcessLost when another process is gone."""
        try:
            self._train()
            # A signal may have reached one process only, and the checkpoint must be written before any of them ends.
            if self._any(self.stop.received is not None) and self.trainer.step < self.recipe.steps:
                raise self._stopped(signal.SIGTERM)
            finished = self._finish(evaluate=evaluate)
            if self._any(not finished):
                raise self._stopped(
                    signal.SIGTERM,
                    during=", the last, in the evaluation: the steps are kept, the evaluation is repeated",
                )
        except KeyboardInterrupt as error:
            raise self._stopped(signal.SIGINT) from error

    def _any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.trainer.processes.numbers(float(flag)).any())

    def _stopped(self, default: int, *, during: str = "") -> Stopped:
        """The end by the signal that this process received, or by `default` if another one did."""
        number = self.stop.received or default
        return Stopped(self.folder.resume_command, self.trainer.step, number, during=during, prints=self.is_main)

    def _train(self) -> None:
        trainer, evaluator, grids = self.trainer, self.evaluator, self.grids
        trainer.callbacks = [self.stop, *trainer.callbacks]
        with ProgressBar(self.display, steps=self.recipe.steps, done=trainer.step) as bar:
            if self.is_main:
                # Metrics before the checkpoint: a run resumed from it has all its lines. The checkpoint before what
                # takes long: a kill in an evaluation loses nothing, because the evaluation is repeated.
                trainer.callbacks += [MetricsWriter(self.folder), evaluator.events, bar, evaluator.checkpoints]
                trainer.callbacks += [GradientMapWriter(self.folder), grids]
                grids.begin(trainer)
            trainer.callbacks += [evaluator]
            try:
                trainer.train(progress=False, history=False)  # metrics.jsonl has it, and the display is ours
            except WentWrong as error:
                if self.is_main:
                    evaluator.events.write(error.event)
                raise
        is_done = trainer.step >= self.recipe.steps
        if self.recipe.reference != "base" and is_done and not trainer.policy.referred and self.is_main:
            told = f"reference: {self.recipe.reference} changed nothing: no term uses a reference"
            tell(self.display.console, told, important=True)

    def _finish(self, *, evaluate: bool) -> bool:
        """Base against trained, what the terms did, and the report; False when a signal interrupted it."""
        rows = read_lines(self.folder.metrics) if self.is_main else []
        agreed = agreements(rows)
        if evaluate and self.recipe.evaluate is not None:
            try:
                self.evaluator.finish(self.trainer, agreed)
            except Interrupted:
                return False
        elif evaluate and self.is_main:
            self.grids.write_before_after(self.trainer)
        if not self.is_main:
            return True
        out = make_console()
        for agreement in agreed:
            tell(out, str(agreement))
        for told in story(phases(rows), self.evaluator.scores_by_step(), self.evaluator.changes):
            tell(out, told, prose=True)
        if evaluate:
            _write_last(self.folder, self.display.console)
        return True


def _write_last(folder: RunFolder, console: Console) -> None:
    """The report and the model card; a run for which one fails is complete all the same, and says so."""
    from agsm_rl.export.model_card import write_card
    from agsm_rl.report.page import write_report

    last: dict[str, tuple[Callable[[], object], str]] = {
        "report.html": (lambda: write_report([folder.path], folder.report), "report"),
        "adapter/README.md": (lambda: write_card(folder.path), "card"),
    }
    for name, (write, command) in last.items():
        try:
            write()
        except Exception as error:  # whatever it is, hours of training must not end as a failure because of it
            tell(
                console,
                f"{name} was not written ({type(error).__name__}: {error}); the run is complete. To try again: "
                f"agsm-rl {command} {folder.path}",
                important=True,
            )


def _load_newest(trainer: Trainer, folder: RunFolder, console: Console) -> dict[str, Any] | None:
    """Load the newest good checkpoint, if any, and drop what was recorded after it; return its score history."""
    newest = checkpoints.newest(folder.checkpoints)
    step, history = 0, None
    if newest is not None:
        step, state = newest
        history = state.get("standing")  # checkpoints of earlier versions have none
        try:
            trainer.load_state_dict(state)
        except UserError as error:
            raise UserError(f"{folder.checkpoints}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{folder.checkpoints}: the checkpoint of step {step} does not belong to this program and recipe "
                f"({type(error).__name__}: {error}); delete it to resume from an older one"
            ) from error
    _check_same_step(trainer, folder)
    if trainer.accelerator.is_main_process:
        lines = (folder.metrics, folder.evaluations, folder.image_scores, folder.events, folder.gradient_map)
        for file in lines:
            MetricsFile(file).cut(step)
        tell(
            console,
            f"continuing {folder.path} after step {step}" if step else f"{folder.path}: no checkpoint yet, starting",
        )
    return history


def _check_same_step(trainer: Trainer, folder: RunFolder) -> None:
    """UserError, on all processes alike, when some loaded another checkpoint than the first one did."""
    steps = trainer.processes.numbers(float(trainer.step)).tolist()
    if len(set(steps)) > 1:
        index = next(index for index, step in enumerate(steps) if step != steps[0])
        raise UserError(
            f"{folder.path}: process 0 resumes after step {steps[0]:.0f}, process {index} after step "
            f"{steps[index]:.0f}: all machines must see the same run folder (a shared file system, or a copy of it on "
            "each)"
        )


def _start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Start tracking under the recipe's plain settings."""
    if recipe.track:
        settings = {"seed": recipe.seed, "steps": recipe.steps, "recipe": recipe.to_yaml()}
        accelerator.init_trackers("agsm-rl", config=settings)


def _default_folder(where: str) -> Path:
    """runs/<recipe's name>-<time>, made at once: two runs that start in the same second get two folders."""
    name = f"{Path(where).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for count in itertools.count(1):
        path = Path("runs") / (name if count == 1 else f"{name}-{count}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.exists():
                raise  # `runs` is a file
        else:
            return path
    raise AssertionError("the count never ends")


def _shared(make: Callable[[], Path]) -> Path:
    """The first process's path, on all processes: their clocks may differ."""
    accelerator = make_accelerator()  # before the first exchange, which would set the processes up with other timeouts
    values = [str(make()) if accelerator.is_main_process else ""]
    broadcast_object_list(values)
    return Path(values[0])
