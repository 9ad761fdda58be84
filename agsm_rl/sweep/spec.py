"""The sweep file and its typed form: a base recipe, axes, seeds, a budget, evaluations, and a search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from agsm_rl.errors import UserError
from agsm_rl.recipe.options import Section, Seed, explain, unknown_key
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.recipe.values import Name
from agsm_rl.recipe.yaml_file import apply_overrides, read_yaml, split_path

VALUES = (str, int, float, bool, type(None))
MAX_CELLS = 10_000
"""Cells of a sweep, or trials times seeds of a search. More is a slip, and would fill the memory before anything runs.
"""
SWEEP_KEYS = ("start_from", "budget_share")
"""Keys of a named variant that belong to the sweep: the variant to start from, and its share of the budget."""


class Budget(Section):
    """The budget of every cell, in one of three units.

    `steps`: optimiser steps. `images`: images sampled by rollouts plus images read from pairs (budget.py). `seconds`:
    training time without evaluation.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    images: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"a budget is one of steps, images or seconds; got {', '.join(given) or 'none'}")
        return self


class Range(Section):
    """An axis to search, from `low` to `high`: integers if both are integers; `log` searches on a log scale."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"`low` must be less than `high`; got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"with `log`, `low` must be greater than 0; got {self.low}")
        return self


class Search(Section):
    """What Optuna maximises: the mean over seeds of a score at `guidance` (null: at each cell's best guidance).

    `maximise` names a score as `checkpoint.best` does: `strict`, or with `evaluate.suites` e.g. `mine/sharpness`. A
    score of which less is better is minimised.
    """

    trials: int = Field(ge=1, le=MAX_CELLS)
    maximise: str = "strict"
    split: Literal["train", "validation"] = "validation"
    guidance: float | None = None
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _never_held_out(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("split") == "held_out":
            raise ValueError(
                "`split: held_out` is for the report alone: a score that was used to choose no longer measures anything"
            )
        return value


@dataclass(frozen=True)
class Axis:
    """One thing that varies. `key` is a dotted path of the recipe; with named variants, it is only a label."""

    key: str
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)
    range: Range | None = None


class Sweep(Section):
    """The keys of a sweep file."""

    name: Name | None = None
    recipe: str | dict[str, Any]
    set: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    seeds: Annotated[int, Field(ge=1, le=MAX_CELLS)] | Annotated[list[Seed], Field(min_length=1)] = 1
    budget: Budget | None = None
    search: Search | None = None
    evaluate: list[dict[str, Any]] | dict[str, Any] | None = None

    @property
    def seed_list(self) -> list[int]:
        """The seeds; a number n means 0 … n − 1."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def read_sweep(path: Path, overrides: Iterable[str] = ()) -> tuple[Sweep, list[Axis]]:
    """The sweep in a file, and its axes; a UserError names the first mistake and its place. Torch is not loaded."""
    where, data = str(path), read_yaml(path, "sweep")
    apply_overrides(data, overrides)
    if "objectives" in data and "recipe" not in data:
        raise UserError(
            f"{where}: is a recipe (it has `objectives`), not a sweep; run it with `agsm-rl train {where}`."
        )
    try:
        sweep = Sweep.model_validate(data)
    except ValidationError as error:
        raise explain(error, where=f"{where}: ") from error
    if len(set(sweep.seed_list)) < len(sweep.seed_list):
        raise UserError(f"{where}: seeds: {sweep.seed_list} lists a seed twice.")
    axes = [_axis(key, value, where=where) for key, value in sweep.axes.items()]
    _check_search(sweep, axes, where=where)
    _check_effect(sweep, axes, where=where)
    _check_number(sweep, axes, where=where)
    return sweep, axes


def _axis(key: str, value: Any, *, where: str) -> Axis:
    place = f"{where}: axes.{key}"
    if isinstance(value, list) and value:
        for item in value:
            parts = item if isinstance(item, list) else [item]
            if not all(isinstance(part, VALUES) for part in parts):
                raise UserError(
                    f"{place}: a list may contain numbers, strings, booleans, or lists of them; got {item!r}. To vary "
                    f"whole blocks, name the variants: {{first: {{{key}: …}}, second: {{{key}: …}}}}."
                )
        return Axis(key, values=value)
    if isinstance(value, dict) and value and not set(value) - set(Range.model_fields) and not _holds_changes(value):
        try:
            return Axis(key, range=Range.model_validate(value))
        except ValidationError as error:
            raise explain(error, where=place) from error
    if isinstance(value, dict) and value:
        for name, changes in value.items():
            _check_variant(str(name), changes, place=place)
        return Axis(key, variants={str(name): changes or {} for name, changes in value.items()})
    raise UserError(
        f"{place}: got {value!r}; an axis is a list of values, named variants {{name: {{key: value, …}}}}, or a range "
        "{low: …, high: …} to search."
    )


def _holds_changes(value: dict[str, Any]) -> bool:
    """Whether these are variants (which may be called low and high) rather than a range."""
    return all(isinstance(changes, dict) for changes in value.values())


def _check_variant(name: str, changes: Any, *, place: str) -> None:
    if not all(letter.isalnum() and letter.isascii() or letter in "_-." for letter in name):
        raise UserError(f"{place}.{name}: a variant's name may contain letters, digits, _, - and . only.")
    if not isinstance(changes, dict | None):
        raise UserError(f"{place}.{name}: got {changes!r}; a variant is a mapping {{key.path: value, …}}, or {{}}.")
    for key in changes or {}:
        if not isinstance(key, str):
            raise UserError(f"{place}.{name}: got the key {key!r}; a key is a dotted path of the recipe.")
    start = (changes or {}).get("start_from")
    if not isinstance(start, str | None):
        raise UserError(f"{place}.{name}.start_from: got {start!r}; give a variant's name, a run folder, or null.")
    share = (changes or {}).get("budget_share", 1)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UserError(f"{place}.{name}.budget_share: got {share!r}; give a number in (0, 1].")


def _check_search(sweep: Sweep, axes: list[Axis], *, where: str) -> None:
    ranges = [axis.key for axis in axes if axis.range]
    if ranges and sweep.search is None:
        raise UserError(f"{where}: axes.{ranges[0]} is a range; add `search: {{trials: 20}}`, or list the values.")
    if sweep.search and not ranges:
        raise UserError(f"{where}: search: no axis is a range {{low: …, high: …}}, so there is nothing to search.")
    if sweep.search and any("start_from" in changes for axis in axes for changes in axis.variants.values()):
        raise UserError(
            f"{where}: search: variants with `start_from` cannot be searched; list the values instead of a range."
        )


def _check_effect(sweep: Sweep, axes: list[Axis], *, where: str) -> None:
    """UserError for a change that the sweep itself would overwrite, so that the cell's name would be wrong."""
    for place, key, value in _changes(sweep, axes):
        got, changed = f"{where}: {place}: got {value!r}", split_path(key)[0]
        if changed == "seed":
            raise UserError(f"{got}, but the seeds of all cells are the sweep's own `seeds`; list them there.")
        if changed == "steps" and sweep.budget is not None:
            [(unit, amount)] = sweep.budget.model_dump(exclude_none=True).items()
            raise UserError(
                f"{got}, but `budget: {{{unit}: {amount}}}` decides how long each cell trains; leave one of the two "
                "out; without the `steps`, what has been trained stays as it is. (A named variant may have a part of "
                "the budget: `budget_share: 0.5`.)"
            )
        if changed == "budget_share" and sweep.budget is None:
            raise UserError(
                f"{got}, but there is no budget to share; add `budget: {{steps: …}}`, or set the variant's `steps`."
            )


def _changes(sweep: Sweep, axes: list[Axis]) -> Iterator[tuple[str, str, Any]]:
    """All changes to the recipe: the place in the sweep's file, the dotted key, and the value or values."""
    for key, value in sweep.set.items():
        yield f"set.{key}", key, value
    for axis in axes:
        if not axis.variants:
            yield f"axes.{axis.key}", axis.key, sweep.axes[axis.key]
        for name, changes in axis.variants.items():
            for key, value in changes.items():
                yield f"axes.{axis.key}.{name}.{key}", key, value


def _check_number(sweep: Sweep, axes: list[Axis], *, where: str) -> None:
    """UserError, before any cell is made, when there would be more than MAX_CELLS; those of a range are trials."""
    factors = {f"axes.{axis.key}": len(axis.variants) or len(axis.values) for axis in axes if axis.range is None}
    factors["seeds"] = sweep.seeds if isinstance(sweep.seeds, int) else len(sweep.seeds)
    if sweep.search is not None:
        factors = {"search.trials": sweep.search.trials, "seeds": factors["seeds"]}
    number = prod(factors.values())
    if number > MAX_CELLS:
        listed = " × ".join(f"{count:,} ({key})" for key, count in factors.items())
        raise UserError(
            f"{where}: {listed} are {number:,} cells, but a sweep has at most {MAX_CELLS:,}; list fewer values or "
            "seeds, or divide it into several sweeps."
        )


def read_evaluations(given: Any, *, where: str) -> list[Evaluate]:
    """The evaluations of each cell. Their splits must differ, because each split has its own file."""
    entries = given if isinstance(given, list) else [given]
    evaluations: list[Evaluate] = []
    for index, entry in enumerate(entries):
        place = f"{where}: evaluate[{index}]"
        if isinstance(entry, dict) and entry.get("every") is not None:
            raise UserError(f"{place}.every: a sweep evaluates finished cells only; leave it out.")
        try:
            evaluation = Evaluate.model_validate(entry)
        except ValidationError as error:
            raise explain(error, where=place) from error
        if evaluation.split in [other.split for other in evaluations]:
            raise UserError(f"{place}.split: '{evaluation.split}' is listed twice; give each evaluation its own split.")
        evaluations.append(evaluation)
    return evaluations


def unknown_variant(name: str, axis: Axis, *, where: str) -> UserError:
    """The error for a `start_from` that is neither a variant nor a folder."""
    return UserError(
        f"{where}: start_from: {unknown_key(name, list(axis.variants)).replace('an option here', 'a variant')} "
        "It may also be the folder of a finished run."
    )


def stem(where: str) -> str:
    """The default name of a sweep: that of its file."""
    return Path(where).stem
