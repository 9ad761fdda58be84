"""Settings with which a recipe's run fits a given memory, the gentlest first.

Smaller passes and checkpointing do not change what is learned. Only if they are not enough are the base's weights held
in bfloat16, and then quantised to 8 and 4 bits, which changes the base. Each candidate is rehearsed (meta_device.py),
so the proposal comes with a prediction, not an estimate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agsm_rl.doctor.memory.predict import Prediction, predict
from agsm_rl.errors import UserError
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block
from agsm_rl.recipe.yaml_file import set_value, split_path

MARGIN = 0.15
"""Share of the prediction that is kept free: predictions are accurate to about this."""
STEPS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("gradient_checkpointing", True, (False,)),
    ("text", {"keep": "cache"}, (None, {"keep": "load"}, {"keep": "offload"})),
    ("cpu_offload", "model", (None,)),
    ("dtype", "bfloat16", ("float32",)),
    ("vae_tiling", True, (False,)),
    ("quantize", "int8", (None,)),
    ("quantize", "nf4", (None, "int8", "fp8")),
)
"""Options of the backbone, what they are set to, and instead of what; the gentlest first."""
PASSES = ("images_per_pass", "rows_per_pass")


@dataclass(frozen=True)
class Fit:
    """`changes` to the recipe by key path, and the memory the run then needs. If not `fits`: the smallest found."""

    changes: dict[str, Any]
    prediction: Prediction
    fits: bool


def fit(recipe: Recipe, prediction: Prediction, budget: float) -> Fit:
    """The gentlest changes that make the run fit `budget` bytes with MARGIN to spare.

    `prediction`: that of the unchanged recipe. Passes are halved where the peak is, until the run fits. If passes of 1
    are not enough, STEPS are taken one after another, and those that turn out not to be needed are taken back.
    """
    if _within(prediction, budget):
        return Fit({}, prediction, True)
    knobs = _knobs(recipe, recipe.parts)
    smallest = {path: 1 for paths in knobs.values() for path in paths}
    known: dict[str, Prediction] = {}

    def try_out(changes: Mapping[str, Any]) -> Prediction:
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            result = predict(changed(recipe, changes))[1]
            if isinstance(result, str):
                raise UserError(f"{recipe.parts.where}: the memory cannot be predicted ({result})")
            known[key] = result
        return known[key]

    least, refused = Fit({}, prediction, False), set[str]()
    for extra in _extras(recipe):
        extra = {path: value for path, value in extra.items() if path not in refused}
        try:
            candidate = try_out(extra | smallest)
        except UserError:
            if "backbone.vae_tiling" not in extra:
                raise
            refused.add("backbone.vae_tiling")  # this autoencoder has none
            continue
        least = min(least, Fit(extra | smallest, candidate, False), key=lambda fit: fit.prediction.peak)
        if not _within(candidate, budget):
            continue
        chosen = _needed(extra, lambda changes: _within(try_out(changes | smallest), budget))
        while not _within(candidate := try_out(chosen), budget):
            before = dict(chosen)
            for phase, peak in candidate.peaks.items():
                for path, size in knobs.get(phase, {}).items() if not _within_bytes(peak, budget) else ():
                    chosen[path] = max(1, chosen.get(path, size) // 2)
            if chosen == before:
                chosen |= smallest  # known to fit
        return Fit(chosen, candidate, True)
    return least


def _needed(extra: Mapping[str, Any], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Those of the changes without which it does not fit, the last ones that were added kept longest."""
    needed = dict(extra)
    for path in [*extra][:-1]:
        without = {name: value for name, value in needed.items() if name != path}
        if fits(without):
            needed = without
    return needed


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
    """Changes besides passes, cumulative: none; no kept graphs; then those of STEPS that the backbone has."""
    extra: dict[str, Any] = {}
    yield dict(extra)
    graphs = {
        f"{path}.keep_graph": False for path, block in _sources(recipe).items() if block.options.get("keep_graph")
    }
    if graphs:
        extra |= graphs
        yield dict(extra)
    options = recipe.backbone.options
    for name, value, instead_of in STEPS:
        if name == "gradient_checkpointing" and options.get("compile") not in (None, "regional"):
            continue  # a denoiser whose blocks are checkpointed cannot be compiled as a whole
        if name == "quantize" and options.get("lora"):
            continue  # a LoRA cannot be fused into quantised weights
        if name in ("text", "cpu_offload") and _changes_text(recipe):
            continue  # its prompts are encoded anew for each prediction
        if name in options and options[name] in instead_of:
            extra[f"backbone.{name}"] = value
            yield dict(extra)


def _knobs(recipe: Recipe, parts: Parts) -> dict[str, dict[str, int]]:
    """Phase → path of an option that bounds its memory → its value, or the effective one; only those above 1."""
    knobs: dict[str, dict[str, int]] = {}
    for index, term in enumerate(recipe.objectives):
        block, place = recipe.source_of(index)
        rows = _rows(block, term.view, parts, place)
        for name in PASSES:
            if name in term.options and rows is not None:
                groups = term.options.get("groups_per_pass")
                most = rows if groups is None else min(rows, groups * int(term.options["group_size"]))
                size = min(most, term.options[name] or most)
                knobs[f"learning {term.name}"] = {f"objectives.{index}.{name}": size}
        if "steps_per_pass" in term.options:
            steps = {f"objectives.{index}.steps_per_pass": term.options["steps_per_pass"]}
            knobs.setdefault(f"learning {term.name}", {}).update(steps)
        if "sample_batch_size" in block.options:
            named = term.source if isinstance(term.source, str) else term.name
            knobs[f"drawing {named}"] = {f"{_path(place)}.sample_batch_size": block.options["sample_batch_size"]}
    if recipe.evaluate is not None:
        knobs["evaluating"] = {"evaluate.batch_size": recipe.evaluate.drawn_at_once}
    return {phase: {path: size for path, size in paths.items() if size > 1} for phase, paths in knobs.items()}


def _changes_text(recipe: Recipe) -> bool:
    return any(block.options.get("text_encoders") for block in recipe.adapters.values())


def _sources(recipe: Recipe) -> dict[str, Block]:
    """The recipe's sources by their key paths."""
    sources = [recipe.source_of(index) for index in range(len(recipe.objectives))]
    return {_path(place): block for block, place in sources}


def _path(place: str) -> str:
    """`objectives[0].source` as a key path."""
    return place.replace("[", ".").replace("]", "")


def _rows(block: Block, view: Block | None, parts: Parts, place: str) -> int | None:
    """Rows that a term learns from in a step; None if that depends on the batch."""
    size = parts.construct("sources", block, place, seed=0).batch_size
    if view is not None and size is not None:
        size = parts.construct("views", view, f"{place}.view", seed=0).batch_size(size)
    return size
