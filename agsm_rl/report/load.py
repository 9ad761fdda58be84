"""Run folders and sweeps, read for a report: runs, grouped into variants over seeds, and what cannot be compared."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from agsm_rl.errors import UserError
from agsm_rl.evaluate.image_folder import sha256
from agsm_rl.files import check_contained, check_kinds, read_json
from agsm_rl.recipe.options import Section, explain
from agsm_rl.recipe.yaml_file import read_yaml
from agsm_rl.report.eval_file import NOT_EVALUATED, EvalFile, read_eval_file
from agsm_rl.run.folder import RunFolder, seed_suffix

SWEEP_FILE = "sweep.json"
DONE = "done"
HOW_COMPUTED = ("device", "dtype", "gradient_checkpointing", "local_files_only", "memory_format", "compile")
"""A backbone's options that say how it is computed; what this changes in the base's images is told in a note."""
WATCHING = ("evaluate", "sample", "checkpoint", "track")
"""A recipe's keys that do not alter what is trained."""


@dataclass(frozen=True)
class Run:
    """A finished run. `validation` is its second evaluation, on which a guidance may be chosen."""

    name: str
    path: Path
    variant: str
    seed: int
    recipe: dict[str, Any]
    evaluation: EvalFile
    validation: EvalFile | None


@dataclass(frozen=True)
class SweepCell:
    """What a sweep says of one of its runs; `used` is whether its figures are in the report, `why` why not."""

    name: str
    variant: str
    seed: int
    status: str
    used: bool
    why: str = ""


@dataclass(frozen=True)
class Variant:
    """Runs of one recipe over seeds, in the seeds' order."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs."""
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True)
class Loaded:
    """All that a report is made of. `guidances` are those at which every run was evaluated."""

    title: str
    variants: tuple[Variant, ...]
    cells: tuple[SweepCell, ...]
    guidances: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """The runs of all variants."""
        return [run for variant in self.variants for run in variant.runs]

    @property
    def evaluated(self) -> bool:
        """Whether there are verdicts; otherwise there are only curves."""
        return self.evaluation is not NOT_EVALUATED

    @property
    def evaluation(self) -> EvalFile:
        """The first run's: its prompts, split and seed are everybody's."""
        return self.runs[0].evaluation


def load(paths: Sequence[Path]) -> Loaded:
    """Read run folders, or one sweep's folder; UserError says which cannot be used or compared, and why."""
    sweeps = [path for path in paths if _is_sweep(path)]
    if sweeps and len(paths) > 1:
        raise UserError(f"{sweeps[0]}: is a sweep; give either one sweep, or run folders, not both.")
    if sweeps:
        title, runs, cells = _sweep(paths[0])
    else:
        runs, cells = _named([_run(path) for path in paths]), []
        title = ", ".join(dict.fromkeys(run.variant for run in runs))
    check_comparable(runs)
    order = dict.fromkeys(run.variant for run in runs)
    variants = tuple(
        Variant(name, tuple(sorted((run for run in runs if run.variant == name), key=lambda run: run.seed)))
        for name in order
    )
    guidances = [one for one in runs[0].evaluation.guidances if all(one in run.evaluation.trained for run in runs)]
    return Loaded(title, variants, tuple(cells), tuple(guidances), tuple(_notes(runs, guidances)))


def _is_sweep(path: Path) -> bool:
    """Whether a folder has a sweep's record; UserError where that is a link out of it, or not a file."""
    if not os.path.lexists(path / SWEEP_FILE):
        return False
    check_contained(path, [SWEEP_FILE])
    check_kinds(path, {SWEEP_FILE: "a file"})
    return True


def _run(path: Path, *, variant: str = "", name: str = "") -> Run:
    folder = RunFolder(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such folder.")
    folder.check_contained(to_read=True)
    if not path.is_dir() or not folder.recipe.is_file():
        raise UserError(f"{path}: is no run folder (it has no recipe.yaml) and no sweep (it has no {SWEEP_FILE}).")
    recipe, keys = _read_recipe(folder.recipe)
    measured = folder.eval.is_file()
    if not measured and (recipe.get("evaluate") is not None or not folder.metrics.is_file()):
        raise UserError(f"{path}: has no eval.json: the run is not finished. Finish it by `{folder.resume_command}`.")
    evaluation = read_eval_file(folder.eval) if measured else NOT_EVALUATED
    _check_measured(evaluation, folder, folder.eval)
    validation = read_eval_file(other) if (other := path / "eval-validation.json").is_file() else None
    if validation is not None:
        _check_measured(validation, folder, other)
    return Run(
        name=name or path.resolve().name,
        path=path,
        variant=variant,
        seed=keys.seed,
        recipe=recipe,
        evaluation=evaluation,
        validation=validation if validation is not None and validation.suite == evaluation.suite else None,
    )


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


def with_text_keys(value: Any) -> Any:
    """YAML's data with every key as text, so that keys can be sorted and written as JSON."""
    if isinstance(value, Mapping):
        return {str(key): with_text_keys(item) for key, item in value.items()}
    return [with_text_keys(item) for item in value] if isinstance(value, list) else value


def _check_measured(evaluation: EvalFile, folder: RunFolder, measured: Path) -> None:
    """UserError when what was measured is not what the run came to, because it has gone on since."""
    for name, digest in evaluation.adapters.items():
        file = folder.adapter / name
        if file.is_file() and sha256(file) != digest:
            raise UserError(
                f"{measured}: measures another {name} than {file}: the run has gone on since. Measure it again."
            )


def _sweep(path: Path) -> tuple[str, list[Run], list[SweepCell]]:
    """A sweep's name, its finished runs, and what became of every cell."""
    file = path / SWEEP_FILE
    content = read_json(file)
    try:
        rows = [
            (str(row["cell"]), str(row["variant"]), int(row["seed"]), str(row["status"]), str(row["run"]))
            for row in content["cells"]
        ]
        errors = [str(row.get("error") or "") for row in content["cells"]]
        title = str(content["name"])
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: is not a sweep's record ({type(error).__name__}: {error!s:.200}).") from error
    runs, cells = [], []
    for (name, variant, seed, status, place), why in zip(rows, errors, strict=True):
        if not _is_inside(path, place):
            raise UserError(f"{file}: the cell '{name}' lies outside the sweep's folder: {place}")
        cell = SweepCell(name, variant, seed, status, used=status == DONE, why=why)
        if cell.used:
            try:
                runs.append(replace(_run(path / place, variant=variant, name=name), seed=seed))
            except UserError as mistake:
                cell = replace(cell, used=False, why=str(mistake))
        cells.append(cell)
    if len({run.evaluation is NOT_EVALUATED for run in runs}) == 2:
        left = {run.name for run in runs if run.evaluation is NOT_EVALUATED}
        runs = [run for run in runs if run.name not in left]
        cells = [replace(one, used=False, why="was not evaluated") if one.name in left else one for one in cells]
    if not runs:
        states = ", ".join(f"{cell.name}: {cell.status}" for cell in cells[:8]) or "it has no cells"
        raise UserError(f"{path}: no cell of the sweep is finished ({states}); run `agsm-rl sweep` again.")
    return title, runs, cells


def _is_inside(folder: Path, place: str) -> bool:
    """Whether a path leads to somewhere in the folder, also through links."""
    try:
        return (folder / place).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, links in a circle
        return False


def _named(runs: list[Run]) -> list[Run]:
    """Runs of one recipe but for the seed are one variant, named by what their folders' names share."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(with_text_keys(_but_for_seed(run)), sort_keys=True, default=str), []).append(run)
    names: dict[str, str] = {}
    for key, members in groups.items():
        name, taken, count = _shared_name(members), set(names.values()), 1
        names[key] = name
        while names[key] in taken:
            count += 1
            names[key] = f"{name} ({count})"
    return [replace(run, variant=names[key]) for key, members in groups.items() for run in members]


def _but_for_seed(run: Run) -> dict[str, Any]:
    """What is measured. In a sweep, a cell that goes on from another goes on from the one of its own seed."""
    kept = {key: value for key, value in run.recipe.items() if key not in ("seed", *WATCHING)}
    kept["bank"] = run.evaluation.bank
    kept["guidance_form"] = run.evaluation.guidance_form
    if kept.get("start_from"):
        kept["start_from"] = str(kept["start_from"]).removesuffix(seed_suffix(run.seed))
    return kept


def _shared_name(runs: list[Run]) -> str:
    """What is left without the seeds; or else what the names begin with alike."""
    if len(runs) == 1:
        return runs[0].name.removesuffix(seed_suffix(runs[0].seed))
    first, *others = [re.sub(rf"[-_. ]*(seed|s)?[-_. ]?{run.seed}$", "", run.name) for run in runs]
    shared = first if {first} == set(others) else os.path.commonprefix([run.name for run in runs]).rstrip("-_. ")
    return shared or " + ".join(str(term.get("use")) for term in runs[0].recipe.get("objectives", []))


def check_comparable(runs: Sequence[Run]) -> None:
    """UserError when runs cannot be paired image by image, or are one run twice."""
    first = runs[0]
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        if (run.evaluation is NOT_EVALUATED) != (first.evaluation is NOT_EVALUATED):
            without, other = (run, first) if run.evaluation is NOT_EVALUATED else (first, run)
            raise UserError(
                f"{without.path}: was not evaluated, but {other.path} was. Evaluate it alike (`agsm-rl eval "
                f"{without.path} --suite … --compare --json {without.path}/eval.json`), or report it apart."
            )
        if first.evaluation is not NOT_EVALUATED:
            unlike = difference(first.evaluation, run.evaluation)
            if unlike is None and _base(first) != _base(run):
                unlike = f"bases ({_base(first)} and {_base(run)})"
            if unlike is not None:
                raise UserError(
                    f"{first.path} and {run.path}: were evaluated on different {unlike}, so their images are no "
                    "pairs. Report them apart, or evaluate them alike (evaluate.split, seed, num_images, num_steps, "
                    "prompt_suffix)."
                )
        twin = seen.setdefault((run.variant, run.seed), run)
        if twin is not run:
            raise UserError(
                f"{run.path} and {twin.path}: are the same recipe with the same seed ({run.seed}); the same run twice "
                "would count as two. Leave one out."
            )
    if first.evaluation is NOT_EVALUATED:
        return
    common = set.intersection(*(set(run.evaluation.trained) for run in runs))
    if not common:
        found = "; ".join(f"{run.path}: {', '.join(f'{g:g}' for g in run.evaluation.guidances)}" for run in runs)
        raise UserError(f"the runs were evaluated at no common guidance ({found}); evaluate them alike.")


SAME: dict[str, Callable[[EvalFile], Any]] = {
    "suites": lambda one: one.suite,
    "splits": lambda one: one.split,
    "noise seeds": lambda one: one.seed,
    "numbers of prompts": lambda one: len(one.prompts),
    "prompts": lambda one: (one.prompts, one.tags),
    "prompt suffixes": lambda one: f"“{one.prompt_suffix}”",
    "numbers of sampling steps": lambda one: one.num_steps,
    "verdicts": lambda one: one.verdicts,
}


def difference(one: EvalFile, other: EvalFile) -> str | None:
    """In what two evaluations are unlike, so that their images are no pairs; None where they are pairs."""
    for what, of in SAME.items():
        if of(one) != of(other):
            return what if what == "prompts" else f"{what} ({of(one)} and {of(other)})"
    return None


def _base(run: Run) -> str:
    """What the backbone is made of: its checkpoint and what else decides what it draws, but for rounding."""
    block = run.recipe.get("backbone", {})
    own = {"use", "checkpoint", *HOW_COMPUTED}
    further = sorted((key, value) for key, value in block.items() if key not in own and value is not None)
    return str(block.get("checkpoint")) + "".join(f", {key}: {value}" for key, value in further)


def _notes(runs: Sequence[Run], guidances: Sequence[float]) -> list[str]:
    """What a reader should know of the runs, in sentences."""
    notes = []
    left = sorted({one for run in runs for one in run.evaluation.trained} - set(guidances))
    if left:
        names = ", ".join(f"{one:g}" for one in left)
        notes.append(f"Not every run was evaluated at guidance {names}; there, variants are not compared.")
    first = runs[0].evaluation
    for guidance in guidances:
        base = first.base[guidance].marks[first.verdicts[0]]
        changed = [int((run.evaluation.base[guidance].marks[first.verdicts[0]] != base).sum()) for run in runs]
        if max(changed):
            notes.append(
                f"At guidance {guidance:g} the runs' own drawings by the base differ in the verdicts of up to "
                f"{max(changed)} of {len(base)} images (other machine or libraries?); each is compared with its own."
            )
    return notes
