"""One cell in a process of its own: `python -m agsm_rl.sweep.cell JOB` trains it, evaluates it, and writes cell.json.

What is there already is not done again: training continues from the newest checkpoint, and each evaluation is kept as
soon as it is made. The process ends, with a checkpoint, when the sweep that started it does.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import typer
from filelock import FileLock

from agsm_rl.errors import UserError
from agsm_rl.files import write_text
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.lifecycle import train
from agsm_rl.run.screen import without_loading_bars
from agsm_rl.run.stop import Stopped
from agsm_rl.sweep.budget import images_taken
from agsm_rl.sweep.evaluations import Evaluations
from agsm_rl.sweep.job import Job
from agsm_rl.sweep.settings import Settings, read_kept, same_training
from agsm_rl.trainer import Callback, Trainer


class TimeLimit(Callback):
    """Ends training after so many seconds of steps, those of earlier sessions included; nothing else is counted."""

    def __init__(self, folder: RunFolder, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._spent: float | None = None

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Stop when the time is spent."""
        if self._spent is None:
            self._spent = sum(row["seconds"] for row in metric_rows(self.folder) if row["step"] < step)
        self._spent += metrics["seconds"]
        if self._spent >= self.seconds:
            trainer.stopping = True


def run_cell(job: Job) -> None:
    """Train and evaluate a cell, as far as that is not done, and write its cell.json."""
    recipe = Recipe.from_data(job.recipe, where=job.cell, allow_imports=frozenset(job.allow_imports))
    folder = RunFolder(job.run)
    trained = _train(job, recipe, folder)
    evaluations = Evaluations(folder, recipe, base=Path(job.base), model_id=f"{job.cell} {trained['recipe']}")
    figures: list[dict[str, Any]] = []
    for settings in job.evaluations:
        options = Evaluate.model_validate(settings)
        name = "eval.json" if options.split == job.reported else f"eval-{options.split}.json"
        figures += evaluations.write(options, name, step=trained["steps"], pictures=options.split == job.reported)
    result = trained | {"settings": job.settings.to_json(), "evaluations": figures, "base": evaluations.base_figures}
    write_text(folder.path / "cell.json", json.dumps(result, indent=1) + "\n")


def _train(job: Job, recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """What training came to: steps, images, seconds. It is kept in trained.json, so that it is not begun again.

    What is evaluated afterwards is none of it: guidances and splits may be added later, while the adapter is there.
    """
    done = folder.path / "trained.json"
    kept = read_kept(done)
    if any(folder.adapter.glob("[!.]*.safetensors")) and _was_trained_so(kept, job):
        write_text(folder.recipe, recipe.to_yaml())
        return kept
    _wait_for(folder)
    if folder.path.is_dir() and not folder.recipe.is_file():
        # Killed before it had written its recipe: nothing was trained there.
        shutil.rmtree(folder.path)
    limits = [] if job.seconds is None else [TimeLimit(folder, job.seconds)]
    train(
        recipe,
        folder.path,
        resume=folder.recipe.is_file(),
        callbacks=limits,
        evaluate=not job.evaluations,  # otherwise all of it is done here; else a last look at samples and curves
    )
    rows = metric_rows(folder)
    steps = int(rows[-1]["step"])
    found = {
        "settings": job.settings.to_json(),
        "recipe": job.settings.fingerprint,
        "steps": steps,
        "images": _images(recipe, steps),
        "seconds": round(sum(row["seconds"] for row in rows), 2),
    }
    write_text(done, json.dumps(found) + "\n")
    return found


def _was_trained_so(kept: dict[str, Any], job: Job) -> bool:
    if "settings" not in kept:
        return False
    return same_training(job.settings, Settings.from_json(kept["settings"]), allow_imports=job.allow_imports)


def metric_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none before the first step."""
    if not folder.metrics.exists():
        return []
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def _images(recipe: Recipe, steps: int) -> int | None:
    """Images that were taken in; None where a source does not say how many it hands out."""
    try:
        return images_taken(recipe, steps)
    except UserError as error:
        logging.getLogger(__name__).warning("%s", error)
        return None


def _wait_for(folder: RunFolder, seconds: float = 600) -> None:
    """A killed sweep's cell may still be writing its last checkpoint."""
    if folder.path.is_dir():
        with FileLock(folder.path / ".lock", timeout=seconds):
            pass


def _end_with_parent() -> None:
    """The sweep holds the other end of stdin: when it is gone, for whatever reason, stop as by SIGTERM."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(job: Path) -> None:
    """Run the cell of a job file; ends with its sweep, so stdin must stay open."""
    without_loading_bars()
    _end_with_parent()
    try:
        run_cell(Job.read(job))
    except UserError as error:
        typer.echo(f"agsm-rl: {error}", err=True)
        raise typer.Exit(2) from error
    except Stopped as stopped:
        typer.echo(f"agsm-rl: {stopped}", err=True)
        raise typer.Exit(stopped.exit_code) from stopped


if __name__ == "__main__":
    typer.run(main)
