"""A run's folder: who may write it, and what is in it (recipe, metrics, checkpoints, adapter, samples)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from filelock import FileLock, Timeout

from agsm_rl.errors import UserError
from agsm_rl.files import check_contained, check_kinds, local_path, write_text
from agsm_rl.recipe.earlier import read_earlier
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.registry import permission_flags
from agsm_rl.run import checkpoints

MAY_CHANGE = {"steps", "evaluate", "sample", "checkpoint", "export", "stop_when", "watch", "gradient_map", "track"}
"""Keys of a recipe that may be changed when a run is resumed: none of them alters the steps already made."""
_OURS = re.compile(
    r"recipe\.yaml|(metrics|evaluations|image_scores|events|gradient_map)\.jsonl|eval(-\w+)?\.json|(cell|trained)\.json|report\.html|"
    r"(?P<folder>checkpoints|adapter|adapter-best|\.adapter-best\.(new|old)|samples|evals|logs)|\.lock"
)
"""Names that we give in a run folder; all else in it is the user's."""
_READ_ELSEWHERE = re.compile(r"recipe\.yaml|(metrics|evaluations|gradient_map)\.jsonl|eval(-\w+)?\.json|adapter")
"""Those that a report reads; links among the pictures are left out of the page one by one."""
_ASIDE = re.compile(r"\.(.+)\.\d+\.new|\.tmp[A-Za-z0-9]+")
"""Names of files that we, or safetensors, write first and rename then; a kill may leave them."""


def seed_suffix(seed: int) -> str:
    """The end of the folder's name for one of several runs over seeds: sweeps use it, and reports group runs by it."""
    return f"-seed{seed}"


class RunFolder:
    """The paths of a run folder and its lock. Constructing it touches nothing; `open` does.

    Args:
        path: The folder.
        reserved: The folder was made for this run, and goes if the run keeps nothing in it.
    """

    def __init__(self, path: str | os.PathLike[str], *, reserved: bool = False) -> None:
        self.path = local_path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.image_scores = self.path / "image_scores.jsonl"
        self.gradient_map = self.path / "gradient_map.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.events = self.path / "events.jsonl"
        self.adapter = self.path / "adapter"
        self.best_adapter = self.path / "adapter-best"
        self.samples = self.path / "samples"
        self.eval = self.path / "eval.json"
        self.report = self.path / "report.html"
        self._lock = FileLock(self.path / ".lock")
        self._new, self._made = False, reserved
        self._granted: Collection[str] = ()

    @property
    def resume_command(self) -> str:
        """What continues the run: its recipe.yaml holds what `--set` changed, but not what was allowed."""
        return f"agsm-rl train {quote(str(self.path))} --resume{permission_flags(self._granted)}"

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """UserError when the folder cannot take this run. Writes nothing, so that a wrong command leaves no trace."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; give a folder as --run-dir.")
        self.check_contained()
        if self.is_unused():
            if resume:
                raise UserError(
                    f"{self.path}: there is no run in it to resume (looked from {Path.cwd()}). Give the run's folder; "
                    "to start a new run there, leave --resume out."
                )
            self._new = True
            return
        if self.recipe.is_file():
            self._take()
        if not resume:
            raise UserError(
                f"{self.path}: is not empty. To resume the run in it: agsm-rl train {quote(str(self.path))} --resume; "
                "for a new run, choose another --run-dir."
            )
        if not self.recipe.is_file():
            raise UserError(
                f"{self.path}: is not a run folder (it has no recipe.yaml), so there is nothing to resume in it."
            )
        check_same(recipe, read_earlier(self.recipe, allow_imports=recipe.parts.allow_imports), self.recipe)
        self._check_checkpoints(recipe)

    def is_unused(self) -> bool:
        """Whether there is nothing in the folder but what a run leaves that was killed before it wrote its recipe."""
        return not self.path.is_dir() or all(_is_left_over(item.name) for item in self.path.iterdir())

    def check_contained(self, *, to_read: bool = False) -> None:
        """UserError when something of ours is a link out of the folder, a pipe, a device, or a folder for a file.

        `to_read`: look only at what a report reads.
        """
        if not self.path.is_dir():
            return
        ours = [match for name in os.listdir(self.path) if (match := _OURS.fullmatch(name))]
        if to_read:
            ours = [match for match in ours if _READ_ELSEWHERE.fullmatch(match[0])]
        check_contained(self.path, [match[0] for match in ours])
        check_kinds(self.path, {match[0]: "a folder" if match["folder"] else "a file" for match in ours})
        for folder in (self.adapter, self.best_adapter):  # written after the last step: too late for a mistake
            check_kinds(folder, {path.name: "a file" for path in folder.glob("*.safetensors")})

    def _check_checkpoints(self, recipe: Recipe) -> None:
        done = max(checkpoints.steps_in(self.checkpoints), default=0)
        if done > recipe.steps:
            raise UserError(
                f"{self.path}: the run has {done} steps already, more than `steps: {recipe.steps}`. Give {done} or "
                "more; for a shorter run, choose another --run-dir."
            )
        if not done and any(self.adapter.glob("[!.]*.safetensors")):
            # adapter/ is written after a checkpoint; starting from nothing would pass for resuming.
            raise UserError(
                f"{self.checkpoints}: the run's checkpoints are gone, but {self.adapter} shows that there were some. "
                f"Put them back; or start a new run in another --run-dir, with start_from: {self.path} to begin with "
                "the adapters that are left."
            )

    def open(self, recipe: Recipe) -> None:
        """Create the folder, take its lock, write the resolved recipe; UserError when another process has the lock."""
        self._granted = recipe.parts.allow_imports
        try:
            self._made = self._made or not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            for left_over in self._left_over():
                left_over.unlink(missing_ok=True)
            for name in (".adapter-best.new", ".adapter-best.old"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            write_text(self.recipe, recipe.to_yaml())
        except OSError as error:
            good = checkpoints.newest_good(self.checkpoints)
            kept = f" The newest good checkpoint is {good}; {self.resume_command} continues from it." if good else ""
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}); free some space, fix the folder's "
                f"permissions, or choose another --run-dir.{kept}"
            ) from error

    def _left_over(self) -> Iterator[Path]:
        """Files written aside that a kill left; only under names that we give."""
        for path in self.path.iterdir():
            match = _ASIDE.fullmatch(path.name)
            if match and match[1] and _OURS.fullmatch(match[1]) and path.is_file():
                yield path
        for folder in (self.adapter, self.best_adapter, self.samples):
            yield from (path for path in folder.rglob(".*") if _ASIDE.fullmatch(path.name) and path.is_file())
        yield from (path for path in self.checkpoints.glob("*.partial") if checkpoints.ASIDE.fullmatch(path.name))

    def discard_unused(self) -> None:
        """After a mistake that showed before the first step was kept: remove what this run made, and nothing else.

        A folder that holds anything else is left as it is.
        """
        if self._new and self._lock.is_locked and self.path.is_dir():  # without the lock, it is another run's
            names = {item.name for item in self.path.iterdir()} - {"recipe.yaml", "logs"}
            if all(_is_left_over(name) for name in names):
                self.close()
                shutil.rmtree(self.path / "logs", ignore_errors=True)
                for name in {*names, "recipe.yaml"}:
                    (self.path / name).unlink(missing_ok=True)
        if self._made:
            with suppress(OSError):  # it is not empty, or not there
                self.path.rmdir()

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
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error}).") from error

    def close(self) -> None:
        """Let the folder go."""
        self._lock.release()


def _is_left_over(name: str) -> bool:
    """A kill before the recipe was written leaves a lock, and perhaps a recipe written aside."""
    return name == ".lock" or (name.startswith(".recipe.yaml.") and name.endswith(".new"))


def check_same(recipe: Recipe, kept: Recipe, file: Path) -> None:
    """UserError unless the recipe is the run's, apart from what does not alter the steps already made."""
    now, then = recipe.to_data(), kept.to_data()
    for key in now:
        if key not in MAY_CHANGE and now[key] != then[key]:
            place, got, had = _first_difference(key, now[key], then[key])
            raise UserError(
                f"{file}: the run was started with {place} = {had!r}, but now it is {got!r}. Resume with the run's own "
                f"recipe (agsm-rl train {file.parent} --resume), or start a new run in another --run-dir."
            )


def _first_difference(place: str, now: Any, then: Any) -> tuple[str, Any, Any]:
    """The innermost place at which two recipes differ, with both values."""
    if isinstance(now, dict) and isinstance(then, dict):
        for key in [*now, *then]:
            if now.get(key) != then.get(key):
                return _first_difference(f"{place}.{key}", now.get(key), then.get(key))
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        for index, (item, item_then) in enumerate(zip(now, then, strict=True)):
            if item != item_then:
                return _first_difference(f"{place}[{index}]", item, item_then)
    return place, now, then
