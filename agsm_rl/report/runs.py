"""One run folder, one file of `agsm-rl eval --json`, or one sweep's folder, read for a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from agsm_rl.errors import UserError
from agsm_rl.evaluate.image_folder import sha256
from agsm_rl.files import check_contained, check_kinds, check_regular, read_json
from agsm_rl.recipe.options import Section, explain
from agsm_rl.recipe.yaml_file import read_yaml
from agsm_rl.report.eval_file import EvalFile, Measured, read_evaluation
from agsm_rl.report.figures import Figure
from agsm_rl.run.folder import RunFolder

SWEEP_FILE = "sweep.json"
DONE = "done"


@dataclass(frozen=True)
class Run:
    """A finished run, or what an evaluation's file says of a model.

    Attributes:
        name: The folder's name, or the model's.
        path: The folder; of an evaluation's file, the folder that the file is in.
        file: The evaluation's file, if there is no run folder; then there are no curves.
        suites: Every suite with figures per image, by name, with its second evaluation, on which a guidance may be
            chosen.
        evaluation: The suite that is looked at, at first the first one; `validation` is its second evaluation.
        figures: (suite, figure) of what has no images to be paired.
        notes: What was not understood, and what a reader should know.
    """

    name: str
    path: Path
    variant: str
    seed: int
    recipe: dict[str, Any]
    evaluation: EvalFile
    validation: EvalFile | None
    suites: Mapping[str, tuple[EvalFile, EvalFile | None]]
    figures: tuple[tuple[str, Figure], ...] = ()
    notes: tuple[str, ...] = ()
    file: Path | None = None

    @property
    def place(self) -> Path:
        """What was given."""
        return self.file or self.path

    @property
    def evaluated(self) -> bool:
        """Whether any suite measured it."""
        return bool(self.suites or self.figures or self.notes)

    def of(self, suite: str) -> Run:
        """The same with another suite to look at."""
        evaluation, validation = self.suites[suite]
        return replace(self, evaluation=evaluation, validation=validation)


@dataclass(frozen=True)
class SweepCell:
    """What a sweep says of one of its runs; `used` is whether its figures are in the report, `why` why not."""

    name: str
    variant: str
    seed: int
    status: str
    used: bool
    why: str = ""


def is_sweep(path: Path) -> bool:
    """Whether a folder has a sweep's record; UserError where that is a link out of it, or not a file."""
    if not os.path.lexists(path / SWEEP_FILE):
        return False
    check_contained(path, [SWEEP_FILE])
    check_kinds(path, {SWEEP_FILE: "a file"})
    return True


def read_runs(path: Path) -> list[Run]:
    """A run folder's run, or the models that an evaluation's file measures; UserError for anything else."""
    if path.is_file() and not path.is_dir():
        return _of_file(path)
    run, others = _of_folder(path)
    return [run, *others]


def _of_file(path: Path) -> list[Run]:
    check_regular(path)
    if path.suffix != ".json":
        raise UserError(
            f"{path}: is a file; give run folders, a sweep's folder, or files written by `agsm-rl eval --json`."
        )
    measured = read_evaluation(path)
    return [_model(path.stem, measured, path), *_beside(measured, path)]


def _beside(measured: Measured, file: Path) -> list[Run]:
    """The other model of an evaluation `--against` it, as a model of its own."""
    if measured.other is None:
        return []
    name, other = measured.other
    return [_model(Path(name).name or name, other, file)]


def _model(name: str, measured: Measured, file: Path) -> Run:
    recipe = {"backbone": dict(measured.backbone)} if measured.backbone else {}
    suites = {suite: (evaluation, None) for suite, evaluation in measured.suites.items()}
    figures, notes = measured.figures, measured.notes
    return Run(name, file.parent, name, 0, recipe, measured.first, None, suites, figures, notes, file=file)


def _of_folder(path: Path, *, variant: str = "", name: str = "") -> tuple[Run, list[Run]]:
    """The run, and what was measured beside it."""
    folder = RunFolder(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such folder.")
    folder.check_contained(to_read=True)
    if not path.is_dir() or not folder.recipe.is_file():
        raise UserError(f"{path}: is neither a run folder (no recipe.yaml) nor a sweep (no {SWEEP_FILE}); give one.")
    recipe, keys = _read_recipe(folder.recipe)
    measured = Measured({}, (), ())
    if folder.eval.is_file():
        measured = read_evaluation(folder.eval)
        _check_measured(measured, folder, folder.eval)
    elif recipe.get("evaluate") is not None or not folder.metrics.is_file():
        raise UserError(f"{path}: has no eval.json: the run is not finished. Finish it by `{folder.resume_command}`.")
    validated = Measured({}, (), ())
    if (second := path / "eval-validation.json").is_file():
        validated = read_evaluation(second)
        _check_measured(validated, folder, second)
    run = Run(
        name=name or path.resolve().name,
        path=path,
        variant=variant,
        seed=keys.seed,
        recipe=recipe,
        evaluation=measured.first,
        validation=None,
        suites={suite: (one, _like(one, validated.suites.get(suite))) for suite, one in measured.suites.items()},
        figures=measured.figures,
        notes=measured.notes,
    )
    return run.of(next(iter(run.suites))) if run.suites else run, _beside(measured, folder.eval)


def _like(evaluation: EvalFile, validation: EvalFile | None) -> EvalFile | None:
    return validation if validation is not None and validation.suite == evaluation.suite else None


class _RecipeKeys(Section):
    """What a report needs of a run's recipe, which another version may have written."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    seed: int = 0
    steps: int = 0
    backbone: dict[str, Any] = {}
    objectives: list[dict[str, Any]] = []


def _read_recipe(file: Path) -> tuple[dict[str, Any], _RecipeKeys]:
    recipe = read_yaml(file)
    try:
        return recipe, _RecipeKeys.model_validate(recipe)
    except ValidationError as error:
        raise explain(error, where=f"{file}: ") from error


def _check_measured(measured: Measured, folder: RunFolder, file: Path) -> None:
    """UserError if the run was continued after it was measured, so that its adapter is another one now."""
    for name, digest in measured.first.adapters.items():
        adapter = folder.adapter / name
        if adapter.is_file() and sha256(adapter) != digest:
            raise UserError(
                f"{file}: {adapter} has changed since this was measured, because the run was continued. Measure it "
                "again."
            )


def read_sweep(path: Path) -> tuple[str, list[Run], list[SweepCell]]:
    """A sweep's name, its finished runs, and what became of every cell."""
    file = path / SWEEP_FILE
    title, rows = _read_record(file)
    runs, cells = [], []
    for name, variant, seed, status, place, why in rows:
        if not _is_inside(path, place):
            raise UserError(f"{file}: the cell '{name}' lies outside the sweep's folder: {place}")
        cell = SweepCell(name, variant, seed, status, used=status == DONE, why=why)
        if cell.used:
            try:
                run, _ = _of_folder(path / place, variant=variant, name=name)
                runs.append(replace(run, seed=seed))
            except UserError as mistake:
                cell = replace(cell, used=False, why=str(mistake))
        cells.append(cell)
    if len({run.evaluated for run in runs}) == 2:
        left = {run.name for run in runs if not run.evaluated}
        runs = [run for run in runs if run.name not in left]
        cells = [replace(one, used=False, why="was not evaluated") if one.name in left else one for one in cells]
    if not runs:
        states = ", ".join(f"{cell.name}: {cell.status}" for cell in cells[:8]) or "it has no cells"
        raise UserError(f"{path}: no cell of the sweep is finished ({states}); run `agsm-rl sweep` again.")
    return title, runs, cells


def _read_record(file: Path) -> tuple[str, Sequence[tuple[str, str, int, str, str, str]]]:
    """The sweep's name, and of each cell its name, variant, seed, state, folder and error."""
    content = read_json(file)
    try:
        rows = [
            (str(row["cell"]), str(row["variant"]), int(row["seed"]), str(row["status"]), str(row["run"]))
            + (str(row.get("error") or ""),)
            for row in content["cells"]
        ]
        return str(content["name"]), rows
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: is not a sweep's record ({type(error).__name__}: {error!s:.200}).") from error


def _is_inside(folder: Path, place: str) -> bool:
    """Whether a path leads to somewhere in the folder, also through links."""
    try:
        return (folder / place).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, links in a circle
        return False
