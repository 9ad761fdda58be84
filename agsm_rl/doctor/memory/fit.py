"""Settings with which a recipe's run fits a given memory: smaller passes, gradient checkpointing, bfloat16 weights.

Smaller passes and checkpointing leave what is learned as it is; only where they are not enough is the base held in
bfloat16, which changes it a little. Each candidate is rehearsed (memory.py), so that what is proposed is predicted to
fit, not reckoned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agsm_rl.doctor.memory.predict import Prediction, predict
from agsm_rl.errors import UserError
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block
from agsm_rl.recipe.yaml_file import set_value, split_path

MARGIN = 0.15
"""Of the prediction, kept free: predictions are good to that."""
PASSES = ("groups_per_pass", "images_per_pass", "rows_per_pass")


@dataclass(frozen=True)
class Fit:
    """`changes` of the recipe by key path, and what the run then needs; not `fits`: the least that was found."""

    changes: dict[str, Any]
    prediction: Prediction
    fits: bool


def fit(recipe: Recipe, prediction: Prediction, budget: float) -> Fit:
    """The gentlest changes with which the run needs at most `budget` bytes, MARGIN to spare.

    `prediction`: the recipe's own. Passes are halved where the peak is, until it fits; where passes of 1 would not do,
    gradient checkpointing comes first, then bfloat16 too.
    """
    if _within(prediction, budget):
        return Fit({}, prediction, True)
    knobs = _knobs(recipe, recipe.parts)
    smallest = {path: 1 for paths in knobs.values() for path in paths}

    def tried(changes: Mapping[str, Any]) -> Prediction:
        found = predict(changed(recipe, changes))[1]
        if isinstance(found, str):
            raise UserError(f"{recipe.parts.where}: the memory cannot be predicted ({found})")
        return found

    least = Fit({}, prediction, False)
    for extra in _extras(recipe):
        found = tried(extra | smallest)
        least = min(least, Fit(extra | smallest, found, False), key=lambda one: one.prediction.peak)
        if not _within(found, budget):
            continue
        chosen: dict[str, Any] = dict(extra)
        while not _within(found := tried(chosen), budget):
            before = dict(chosen)
            for phase, peak in found.peaks.items():
                for path, size in knobs.get(phase, {}).items() if not _within_bytes(peak, budget) else ():
                    chosen[path] = max(1, chosen.get(path, size) // 2)
            if chosen == before:
                chosen |= smallest  # which is known to fit
        return Fit(chosen, found, True)
    return least


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with values set by their paths, as `--set` does it."""
    data = recipe.to_data()
    for path, value in changes.items():
        set_value(data, split_path(path), value, where=recipe.parts.where)
    return Recipe.from_data(data, where=recipe.parts.where, allow_imports=recipe.parts.allow_imports)


def _within(prediction: Prediction, budget: float) -> bool:
    return _within_bytes(prediction.peak, budget)


def _within_bytes(peak: int, budget: float) -> bool:
    return peak * (1 + MARGIN) <= budget


def _extras(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """What may be changed beside passes: nothing; graphs are not kept; gradient checkpointing; and bfloat16 too."""
    extra: dict[str, Any] = {}
    yield dict(extra)
    kept = {f"{path}.keep_graph": False for path, block in _sources(recipe).items() if block.options.get("keep_graph")}
    if kept:
        extra |= kept
        yield dict(extra)
    own = recipe.backbone.options
    # Checkpointed blocks cannot be compiled.
    further = {} if own.get("compile") else {"gradient_checkpointing": True}
    for name, value in (further | {"dtype": "bfloat16"}).items():
        if own.get(name, value) in (False, "float32"):
            extra[f"backbone.{name}"] = value
            yield dict(extra)


def _knobs(recipe: Recipe, parts: Parts) -> dict[str, dict[str, int]]:
    """Phase → path of an option that bounds its memory → its value, or what it comes to if left out; those above 1."""
    found: dict[str, dict[str, int]] = {}
    for index, term in enumerate(recipe.objectives):
        block, place = recipe.source_of(index)
        rows = _rows(block, term.view, parts, place)
        for name in PASSES:
            if name in term.options and rows is not None:
                most = rows // int(term.options["group_size"]) if name == "groups_per_pass" else rows
                size = min(most, term.options[name] or most)
                found[f"learning {term.name}"] = {f"objectives.{index}.{name}": size}
        if "steps_per_pass" in term.options:
            steps = {f"objectives.{index}.steps_per_pass": term.options["steps_per_pass"]}
            found.setdefault(f"learning {term.name}", {}).update(steps)
        if "sample_batch_size" in block.options:
            named = term.source if isinstance(term.source, str) else term.name
            found[f"drawing {named}"] = {f"{_path(place)}.sample_batch_size": block.options["sample_batch_size"]}
    if recipe.evaluate is not None:
        found["evaluating"] = {"evaluate.batch_size": min(recipe.evaluate.batch_size, recipe.evaluate.num_images)}
    return {phase: {path: size for path, size in paths.items() if size > 1} for phase, paths in found.items()}


def _sources(recipe: Recipe) -> dict[str, Block]:
    """The recipe's sources by their key paths."""
    found = [recipe.source_of(index) for index in range(len(recipe.objectives))]
    return {_path(place): block for block, place in found}


def _path(place: str) -> str:
    """`objectives[0].source` as a key path."""
    return place.replace("[", ".").replace("]", "")


def _rows(block: Block, view: Block | None, parts: Parts, place: str) -> int | None:
    """Rows that a term learns from in a step; None where that depends on the batch."""
    size = parts.construct("sources", block, place, seed=0).batch_size
    if view is not None and size is not None:
        size = parts.construct("views", view, f"{place}.view", seed=0).batch_size(size)
    return size
