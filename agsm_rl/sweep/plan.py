"""From a sweep to its cells: every combination of the axes with every seed, all validated before the first one runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from agsm_rl.errors import UserError
from agsm_rl.export.attach import find_exports, names_continued
from agsm_rl.files import local_path
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.resolve import complete_evaluation
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.recipe.shipped import PREFIX, recipe_path
from agsm_rl.recipe.suites import MadeSuite, find_score, make_suites
from agsm_rl.recipe.yaml_file import read_yaml, remove_value, set_value, split_path
from agsm_rl.run.folder import seed_suffix
from agsm_rl.sweep.budget import MAX_STEPS, steps_for
from agsm_rl.sweep.spec import SWEEP_KEYS, Axis, Sweep, read_evaluations, read_sweep, stem, unknown_variant


@dataclass(frozen=True)
class Cell:
    """A variant with a seed: one run. `seconds` limits its training; `after` names the cell it starts from."""

    name: str
    variant: str
    axes: dict[str, Any]
    seed: int
    recipe: Recipe
    seconds: float | None = None
    after: str | None = None


@dataclass
class Plan:
    """A sweep, read and checked."""

    where: str
    folder: Path
    sweep: Sweep
    axes: list[Axis]
    base: dict[str, Any]
    evaluations: list[Evaluate]
    allow_imports: frozenset[str]
    cells: list[Cell] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.sweep.name or stem(self.where)

    @property
    def reported(self) -> Evaluate | None:
        """The evaluation that goes into eval.json: the held-out one, otherwise the last; None if there is none."""
        held_out = [evaluation for evaluation in self.evaluations if evaluation.split == "held_out"]
        candidates = held_out or self.evaluations
        return candidates[-1] if candidates else None

    @property
    def reported_split(self) -> str | None:
        """The split of the reported evaluation."""
        return None if self.reported is None else self.reported.split

    def suites(self, split: str | None) -> list[MadeSuite]:
        """The suites of the evaluation on a split."""
        chosen = [evaluation for evaluation in self.evaluations if evaluation.split == split]
        return make_suites(chosen[0], Parts(where=self.where, allow_imports=self.allow_imports)) if chosen else []

    @cached_property
    def ranked_by(self) -> tuple[str, bool]:
        """The score that ranks the cells, and whether more of it is better: the searched one, or the usual one."""
        split = self.chosen_split if self.sweep.search is None else self.sweep.search.split
        suites = self.suites(split)
        if self.sweep.search is not None:
            name = find_score(self.sweep.search.maximise, suites, where=f"{self.where}: search.maximise")
        else:
            name = suites[0].full_names()[0]
            name = "strict" if suites[0].alone else name
        return name, not any(name in entry.smaller_is_better() for entry in suites)

    @property
    def chosen_split(self) -> str | None:
        """The split that ranks the cells: validation if it is measured."""
        splits = [evaluation.split for evaluation in self.evaluations]
        return "validation" if "validation" in splits else self.reported_split

    def run(self, cell: str) -> Path:
        """A cell's run folder."""
        return self.folder / "cells" / cell

    def starts(self, cell: Cell) -> list[Cell]:
        """The cells that a cell descends from by `start_from`, the nearest first."""
        starts = []
        while cell.after is not None:
            cell = self._by_name[cell.after]
            starts.append(cell)
        return starts

    @cached_property
    def _by_name(self) -> dict[str, Cell]:
        return {cell.name: cell for cell in self.cells}

    def to_data(self) -> dict[str, Any]:
        """The resolved sweep: it contains the base recipe, and the evaluations with all their defaults."""
        data = self.sweep.model_dump(mode="json", exclude_defaults=True)
        resolved = [evaluation.model_dump(mode="json", exclude={"every"}) for evaluation in self.evaluations]
        # The recipe's values as they were read: JSON would turn a schedule's steps into strings.
        values = {"recipe": self.base, "set": self.sweep.set, "axes": self.sweep.axes, "evaluate": resolved}
        return {"name": self.name} | data | values


def make_plan(
    given: str, overrides: Iterable[str] = (), *, folder: Path | None = None, allow_imports: Collection[str] = ()
) -> Plan:
    """Read a sweep file (or builtin:<name>) and check all of it; a UserError names the first wrong key or cell.

    Without `folder`, a sweep.yaml inside a sweep's folder keeps that folder; any other file gets runs/<name>.
    """
    path = recipe_path(given)
    sweep, axes = read_sweep(path, overrides)
    base = _base_recipe(sweep, path)
    evaluations = read_evaluations(_evaluate_block(sweep, base, where=str(path)), where=str(path))
    parts = Parts(where=str(path), allow_imports=allow_imports)
    evaluations = [
        complete_evaluation(evaluation, parts, place=f"evaluate[{index}]")
        for index, evaluation in enumerate(evaluations)
    ]
    if folder is None:
        folder = path.parent if (path.parent / "sweep.json").is_file() else Path("runs") / (sweep.name or path.stem)
    plan = Plan(str(path), folder, sweep, axes, base, evaluations, frozenset(allow_imports))
    _check_searched_split(plan)
    if sweep.search is None:
        plan.cells = _all_cells(plan)
    else:
        # Check one trial at each end of the ranges; the values between are not known yet.
        for end in ("low", "high"):
            _check_cells(plan, [make_cell(plan, choice, sweep.seed_list[0]) for choice in _choices(axes, end)])
    return plan


def make_cell(plan: Plan, choice: dict[str, Any], seed: int) -> Cell:
    """The cell for one choice on each axis; a UserError names it if its recipe cannot work."""
    variant = _label(plan, choice)
    name = variant + seed_suffix(seed)
    where = f"{plan.where}: cell '{name}'"
    data = deepcopy(plan.base)
    for key, value in plan.sweep.set.items():
        _change(data, key, value, where=f"{plan.where}: set.{key}")
    after, share = None, 1.0
    for axis in plan.axes:
        picked = choice[axis.key]
        changes = axis.variants[picked] if axis.variants else {axis.key: picked}
        for key, value in changes.items():
            if axis.variants and key in SWEEP_KEYS:
                continue
            _change(data, key, value, where=f"{where}: {key}")
        share *= changes.get("budget_share", 1.0)
        if axis.variants and "start_from" in changes:
            data["start_from"], after = _start(plan, axis, choice, changes["start_from"], seed, where=where)
    data["seed"] = seed
    data["evaluate"] = None if plan.reported is None else plan.reported.model_dump(mode="json")
    recipe, seconds = _within_budget(plan, data, share, where=where)
    return Cell(name, variant, choice, seed, recipe, seconds, after)


def _base_recipe(sweep: Sweep, path: Path) -> dict[str, Any]:
    if isinstance(sweep.recipe, dict):
        return sweep.recipe
    file = recipe_path(sweep.recipe) if sweep.recipe.startswith(PREFIX) else path.parent / local_path(sweep.recipe)
    try:
        return read_yaml(file)
    except UserError as error:
        hint = " (The path of a recipe is relative to the folder of the sweep file.)" if not file.exists() else ""
        raise UserError(f"{path}: recipe: {error}{hint}") from error


def _evaluate_block(sweep: Sweep, base: dict[str, Any], *, where: str) -> Any:
    """The sweep's `evaluate`, or the base recipe's without `every`."""
    if sweep.evaluate is not None:
        return sweep.evaluate
    block = base.get("evaluate")
    if not isinstance(block, dict):
        raise UserError(
            f"{where}: evaluate: nothing is evaluated, so the cells could not be compared; add e.g. "
            "[{split: held_out, guidance: [1.0, 3.0], num_images: 600}], or [] if you measure them yourself."
        )
    return {key: value for key, value in block.items() if key != "every"}


def _check_searched_split(plan: Plan) -> None:
    search = plan.sweep.search
    if search is None:
        return
    chosen = [evaluation for evaluation in plan.evaluations if evaluation.split == search.split]
    if not chosen:
        raise UserError(f"{plan.where}: search.split: '{search.split}' is not evaluated; add it to `evaluate`.")
    assert plan.ranked_by  # refuses a score that is not measured
    if search.guidance is not None and search.guidance not in chosen[0].guidance:
        raise UserError(
            f"{plan.where}: search.guidance: {search.guidance:g} is not evaluated on {search.split}; choose one of "
            f"{', '.join(f'{guidance:g}' for guidance in chosen[0].guidance)}."
        )


def _choices(axes: list[Axis], end: str = "low") -> list[dict[str, Any]]:
    """Every combination of the axes' values; a range contributes one of its ends."""
    options = [list(axis.variants) or axis.values or [getattr(axis.range, end)] for axis in axes]
    return [dict(zip((axis.key for axis in axes), picked, strict=True)) for picked in product(*options)]


def _all_cells(plan: Plan) -> list[Cell]:
    """All cells, seed by seed, so that an interrupted sweep has compared all variants, on fewer seeds."""
    cells = [make_cell(plan, choice, seed) for seed in plan.sweep.seed_list for choice in _choices(plan.axes)]
    _check_cells(plan, cells)
    return cells


def _check_cells(plan: Plan, cells: list[Cell]) -> None:
    by_name = {cell.name: cell for cell in cells}
    if len(by_name) < len(cells):
        names = [cell.name for cell in cells]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{plan.where}: axes: two cells would be named '{twice}'; name the variants, or remove one.")
    for cell in cells:
        if cell.after is not None:
            _check_same_adapters(plan, cell, by_name[cell.after])
            _check_no_cycle(plan, cell, by_name)


def _check_same_adapters(plan: Plan, cell: Cell, start: Cell) -> None:
    """Adapters that a cell takes over from its start must have the same options in both."""
    adapters, start_adapters = cell.recipe.to_data()["adapters"], start.recipe.to_data()["adapters"]
    kinds, start_kinds = (
        {name: block["use"] for name, block in blocks.items()} for blocks in (adapters, start_adapters)
    )
    where = f"{plan.where}: cell '{cell.name}': start_from"
    for name in names_continued(kinds, start_kinds, where=f"{where}: {start.name}"):
        if start_adapters[name] != adapters[name]:
            raise UserError(
                f"{where}: its adapter '{name}' is {adapters[name]}, but that of '{start.name}' is "
                f"{start_adapters[name]}; give both variants the same."
            )


def _check_no_cycle(plan: Plan, cell: Cell, by_name: dict[str, Cell]) -> None:
    seen, at = [cell.name], cell
    while at.after is not None:
        if at.after in seen:
            raise UserError(f"{plan.where}: start_from forms a cycle: {' -> '.join([*seen, at.after])}.")
        seen.append(at.after)
        at = by_name[at.after]


def _start(
    plan: Plan, axis: Axis, choice: dict[str, Any], given: str | None, seed: int, *, where: str
) -> tuple[str | None, str | None]:
    """The recipe's `start_from`, and the cell that produces it (None: the folder of a finished run)."""
    if given is None:
        return None, None
    if given in axis.variants:
        if given == choice[axis.key]:
            raise UserError(f"{where}: start_from: '{given}' would start from itself.")
        name = _label(plan, choice | {axis.key: given}) + seed_suffix(seed)
        return str(plan.run(name)), name
    try:
        find_exports(Path(given))
    except UserError as error:
        raise unknown_variant(given, axis, where=where) from error
    return given, None


def _within_budget(plan: Plan, data: dict[str, Any], share: float, *, where: str) -> tuple[Recipe, float | None]:
    """The cell's recipe, with the steps that its share of the budget pays for, and its time limit in seconds."""
    budget, seconds = plan.sweep.budget, None
    if budget is not None:
        data["steps"] = 1 if budget.images is not None else MAX_STEPS
        if budget.steps is not None:
            data["steps"] = max(1, round(share * budget.steps))
        elif budget.seconds is not None:
            seconds = share * budget.seconds
    recipe = Recipe.from_data(data, where=where, allow_imports=plan.allow_imports)
    if budget is not None and budget.images is not None:
        images = round(share * budget.images)
        recipe.steps = steps_for(recipe, images)
    return recipe, seconds


def _change(data: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Set the value at a dotted key. null removes the key, unless it accepts null (optimizer.max_grad_norm)."""
    path = split_path(key)
    if path[0] == "evaluate":
        raise UserError(f"{where}: all cells are evaluated in the same way; set it in the sweep's own `evaluate`.")
    if value is None and not _takes_null(path):
        remove_value(data, path, where=where)
    else:
        set_value(data, path, deepcopy(value), where=where)


def _takes_null(path: list[str]) -> bool:
    """Whether the recipe's key at a path accepts null. Options inside blocks are not the recipe's keys."""
    model: type[BaseModel] = Recipe
    for depth, key in enumerate(path):
        if key not in model.model_fields:
            return False
        annotation: Any = model.model_fields[key].annotation
        if depth == len(path) - 1:
            return type(None) in get_args(annotation)
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        models = [kind for kind in inner if issubclass(kind, BaseModel)]
        if not models:
            return False
        model = models[0]
    return False


def _label(plan: Plan, choice: dict[str, Any]) -> str:
    """The variant's name: the names of named variants and `key=value` for other axes, joined by commas."""
    if not choice:
        return plan.name
    return ",".join(
        str(choice[axis.key]) if axis.variants else f"{_short(axis.key, choice)}={_text(choice[axis.key])}"
        for axis in plan.axes
    )


def _short(key: str, keys: Iterable[str]) -> str:
    """The last part of a dotted key, or as many parts as distinguish it from the other axes."""
    parts = split_path(key)
    others = [split_path(other) for other in keys if other != key]
    for count in range(1, len(parts)):
        if not any(other[-count:] == parts[-count:] for other in others):
            return ".".join(parts[-count:])
    return ".".join(parts)


def _text(value: Any) -> str:
    """A value as part of a file name."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "-".join(map(_text, value))
    return "".join(letter if letter.isalnum() or letter in "._+-" else "-" for letter in str(value))
