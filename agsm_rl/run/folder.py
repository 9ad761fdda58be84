"""A run's folder: who may write it, and what is in it (recipe, metrics, checkpoints, adapter, samples)."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from agsm_rl.errors import UserError
from agsm_rl.files import local_path, write_text
from agsm_rl.recipe.earlier import read_earlier
from agsm_rl.recipe.recipe import Recipe

# What may be changed when a run is continued: nothing that alters the steps already made.
MAY_CHANGE = {"steps", "evaluate", "sample", "checkpoint", "export", "stop_when", "watch", "track"}


def seed_suffix(seed: int) -> str:
    """How the folder of one of several runs over seeds ends: a sweep names its cells so, a report groups them by it."""
    return f"-seed{seed}"


class RunFolder:
    """The paths of a run folder and its lock. Constructing it touches nothing; `open` does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.events = self.path / "events.jsonl"
        self.adapter = self.path / "adapter"
        self.best_adapter = self.path / "adapter-best"
        self.samples = self.path / "samples"
        self.eval = self.path / "eval.json"
        self.report = self.path / "report.html"
        self._lock = FileLock(self.path / ".lock")
        self._new = False

    def check(self, recipe: Recipe, *, resume: bool, allow_imports: Collection[str] = ()) -> None:
        """UserError when the folder cannot take this run. Writes nothing, so that a wrong command leaves no trace."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; give a folder as --run-dir.")
        if not self.path.is_dir() or all(_is_left_over(item.name) for item in self.path.iterdir()):
            if resume:
                raise UserError(
                    f"{self.path}: there is no run in it to resume (looked from {Path.cwd()}). Give the run's folder "
                    "as --run-dir; to start a new run there, leave --resume out."
                )
            self._new = True
            return
        if self.recipe.is_file():
            self._take()
        if not resume:
            raise UserError(
                f"{self.path}: is not empty. To continue the run in it, add --resume; for a new run, choose "
                "another --run-dir."
            )
        if not self.recipe.is_file():
            raise UserError(
                f"{self.path}: is no run folder (it has no recipe.yaml), so there is nothing to resume in it."
            )
        check_same(recipe, read_earlier(self.recipe, allow_imports=allow_imports), self.recipe)
        from agsm_rl.run.checkpoints import steps_in

        done = max(steps_in(self.checkpoints), default=0)
        if done > recipe.steps:
            raise UserError(
                f"{self.path}: {done} steps of the run are made and kept, more than `steps: {recipe.steps}`. Give "
                f"{done} or more; for a shorter run, choose another --run-dir."
            )
        if any(self.adapter.glob("[!.]*.safetensors")) and not any(self.checkpoints.glob("step-*.pt")):
            # adapter/ is written after a checkpoint; starting from nothing would pass for going on.
            raise UserError(
                f"{self.checkpoints}: the run's checkpoints are gone, but {self.adapter} shows that there were some. "
                f"Put them back; or start a new run in another --run-dir, with start_from: {self.path} to begin with "
                "the adapters that are left."
            )

    def open(self, recipe: Recipe) -> None:
        """Create the folder, take its lock, write the resolved recipe; UserError when another process has the lock."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error.strerror}); choose another --run-dir.") from error
        self._take()
        for name in (".*.new", "checkpoints/*.partial", "adapter*/.*.new", "adapter*/.tmp*", "samples/.*.new"):
            for aside in self.path.glob(name):  # left by a kill; safetensors writes aside too
                if aside.is_dir():  # an export of the best evaluation
                    shutil.rmtree(aside)
                else:
                    aside.unlink(missing_ok=True)
        write_text(self.recipe, recipe.to_yaml())

    def discard_unused(self) -> None:
        """After a mistake that showed itself before the first step was kept: remove what a new run wrote, and no more.

        A folder in which anything else stands is left as it is.
        """
        if not self._new or not self._lock.is_locked or not self.path.is_dir():  # another's, if we have no lock
            return
        names = {item.name for item in self.path.iterdir()} - {"recipe.yaml", "logs"}
        if all(_is_left_over(name) for name in names):
            self.close()
            shutil.rmtree(self.path)

    def _take(self) -> None:
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{self.path}: is busy, another process trains in it. Wait for it or stop it, or choose another "
                "--run-dir."
            ) from error

    def close(self) -> None:
        """Let the folder go."""
        self._lock.release()


class MetricsFile:
    """metrics.jsonl: a line a step, each written whole; numbers that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Drop the lines after `step` (and a torn last line): they will be written again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | finite(metrics)) + "\n")


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: null stands for it."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _is_left_over(name: str) -> bool:
    """A kill before the recipe was written leaves a lock, and perhaps half a file written aside."""
    return name == ".lock" or (name.startswith(".") and name.endswith(".new"))


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_same(recipe: Recipe, kept: Recipe, file: Path) -> None:
    """UserError unless the recipe is the run's, but for what does not alter the steps already made."""
    now, then = recipe.to_data(), kept.to_data()
    for key in now:
        if key not in MAY_CHANGE and now[key] != then[key]:
            place, got, had = _first_difference(key, now[key], then[key])
            raise UserError(
                f"{file}: the run was started with {place} = {had!r}, but now it is {got!r}. Resume with the run's own "
                f"recipe (agsm-rl train {file} --resume), or start a new run in another --run-dir."
            )


def _first_difference(place: str, now: Any, then: Any) -> tuple[str, Any, Any]:
    if isinstance(now, dict) and isinstance(then, dict):
        for key in [*now, *then]:
            if now.get(key) != then.get(key):
                return _first_difference(f"{place}.{key}", now.get(key), then.get(key))
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        for index, (one, other) in enumerate(zip(now, then, strict=True)):
            if one != other:
                return _first_difference(f"{place}[{index}]", one, other)
    return place, now, then
