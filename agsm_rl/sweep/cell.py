"""One cell in its own process: `python -m agsm_rl.sweep.cell JOB` trains it, evaluates it, and writes cell.json.

Finished work is not repeated: training resumes from the newest checkpoint, and each measurement is saved as soon as it
is made. The process ends, with a checkpoint, when the sweep that started it ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import typer
from filelock import FileLock

from agsm_rl import threads
from agsm_rl.errors import UserError
from agsm_rl.evaluate.kept_files import read_kept
from agsm_rl.files import write_text
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run import checkpoints
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.lifecycle import train
from agsm_rl.run.records import read_lines
from agsm_rl.run.screen import say, without_loading_bars
from agsm_rl.run.stop import Stopped
from agsm_rl.sweep.budget import images_taken
from agsm_rl.sweep.evaluations import CellEvaluations
from agsm_rl.sweep.job import Job
from agsm_rl.sweep.kept import Trained
from agsm_rl.sweep.settings import Settings, same_training
from agsm_rl.trainer import Callback, Trainer


class TimeLimit(Callback):
    """Ends training after `seconds` spent in steps, including those of earlier sessions. Nothing else counts."""

    def __init__(self, folder: RunFolder, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._spent: float | None = None

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Stop when the time is up."""
        if self._spent is None:
            self._spent = seconds_spent(self.folder, before=step)
        self._spent += metrics["seconds"]
        if self._spent >= self.seconds:
            trainer.stopping = True


def seconds_spent(folder: RunFolder, *, before: int) -> float:
    """The seconds that the steps before this one took, according to metrics.jsonl."""
    times = [(row.get("step"), row.get("seconds")) for row in read_lines(folder.metrics)]
    return sum(
        seconds
        for step, seconds in times
        if isinstance(step, int) and step < before and isinstance(seconds, int | float)
    )


def run_cell(job: Job) -> None:
    """Do what is left of a cell's training and evaluation, and write its cell.json."""
    recipe = Recipe.from_data(job.recipe, where=job.cell, allow_imports=frozenset(job.allow_imports))
    folder = RunFolder(job.run)
    folder.check_contained()
    trained = _train(job, recipe, folder)
    evaluations = CellEvaluations(folder, recipe, base=Path(job.base), model_id=f"{job.cell} {trained['recipe']}")
    figures: list[dict[str, Any]] = []
    for settings in job.evaluations:
        options = Evaluate.model_validate(settings)
        name = "eval.json" if options.split == job.reported else f"eval-{options.split}.json"
        figures += evaluations.write(options, name, step=trained["steps"], pictures=options.split == job.reported)
    result = trained | {"settings": job.settings.to_json(), "evaluations": figures, "base": evaluations.base_figures}
    write_text(folder.path / "cell.json", json.dumps(result, indent=1) + "\n")


def _train(job: Job, recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """Train the cell and return its steps, images and seconds. They are kept in trained.json.

    A trained cell is not trained again, whatever is evaluated: guidances and splits may be added later, as long as the
    adapter is there.
    """
    done = folder.path / "trained.json"
    kept = read_kept(done, Trained)
    if any(folder.adapter.glob("[!.]*.safetensors")) and _is_training_of(kept, job):
        write_text(folder.recipe, recipe.to_yaml())
        return kept
    _wait_for(folder)
    if not folder.recipe.is_file() and not folder.is_unused():
        raise UserError(
            f"{folder.path}: has no recipe.yaml but is not empty, so its files are neither used nor deleted. Put its "
            "recipe.yaml back, or move the folder away to train the cell from the beginning."
        )
    limits = [] if job.seconds is None else [TimeLimit(folder, job.seconds)]
    train(
        recipe,
        folder.path,
        resume=folder.recipe.is_file(),
        callbacks=limits,
        evaluate=not job.evaluations,  # the sweep's evaluations are made here; without any, the run draws its samples
        evaluate_later=[Evaluate.model_validate(settings) for settings in job.evaluations],
    )
    steps = max(checkpoints.steps_in(folder.checkpoints))
    trained = {
        "settings": job.settings.to_json(),
        "starts": {name: settings.to_json() for name, settings in job.starts.items()},
        "recipe": job.settings.fingerprint,
        "steps": steps,
        "images": _images(recipe, steps),
        "seconds": round(seconds_spent(folder, before=steps + 1), 2),
    }
    write_text(done, json.dumps(trained) + "\n")
    return trained


def _is_training_of(kept: dict[str, Any], job: Job) -> bool:
    """Whether a trained.json describes the training that the job asks for."""
    if kept.get("settings") is None:
        return False
    try:
        return same_training(job.settings, Settings.from_json(kept["settings"]), allow_imports=job.allow_imports)
    except UserError:  # these are not settings
        return False


def _images(recipe: Recipe, steps: int) -> int | None:
    """The number of images consumed; None if a source does not say how many it returns."""
    try:
        return images_taken(recipe, steps)
    except UserError as error:
        logging.getLogger(__name__).warning("%s", error)
        return None


def _wait_for(folder: RunFolder, seconds: float = 600) -> None:
    """Wait for an earlier process of this cell: after a kill, it may still be writing its last checkpoint."""
    if folder.path.is_dir():
        with FileLock(folder.path / ".lock", timeout=seconds):
            pass


def _end_with_parent() -> None:
    """Stop as after SIGTERM when the sweep is gone for any reason: it holds the other end of stdin."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(job: Path) -> None:
    """Run the cell of a job file. It stops when stdin is closed."""
    threads.follow_free_cores()
    without_loading_bars()
    _end_with_parent()
    try:
        run_cell(Job.read(job))
    except (UserError, OSError) as error:
        say(f"agsm-rl: {error}", err=True)
        raise typer.Exit(2) from error
    except Stopped as stopped:
        say(f"agsm-rl: {stopped}", err=True)
        raise typer.Exit(stopped.exit_code) from stopped


if __name__ == "__main__":
    typer.run(main)
