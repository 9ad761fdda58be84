"""The mistakes in what a recipe's blocks say of each other, and in names of files and trackers.

Nothing that the blocks name is imported for it, so that they are reported at once.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from agsm_rl.errors import MistakesSoFar, unknown_name
from agsm_rl.files import local_or_hub
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import RecipeKeys

TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "mlflow": "mlflow",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
"""accelerate's trackers → the package that each needs."""


def mistakes_between_blocks(recipe: RecipeKeys, parts: Parts) -> list[str]:
    """The message of each."""
    mistakes = MistakesSoFar(parts.where)
    checks = (
        _check_names,
        _check_adapters_trained,
        _check_reference,
        _check_dtype,
        _check_rates,
        _check_trackers,
        _check_samples,
    )
    for check in checks:
        with mistakes.collected():
            check(recipe, parts)
    return mistakes.messages


def _check_names(recipe: RecipeKeys, parts: Parts) -> None:
    """Each term has a name of its own, and the sources that terms name are there."""
    mistakes = MistakesSoFar(parts.where)
    names: set[str] = set()
    for index, term in enumerate(recipe.objectives):
        place = f"objectives[{index}]"
        with mistakes.collected():
            if term.name in names:
                raise parts.refuse(f"{place}.name", f"'{term.name}' is the name of another term; give each its own")
        names |= {term.name} if term.name is not None else set()
        with mistakes.collected():
            if isinstance(term.source, str) and not recipe.sources:
                raise parts.refuse(
                    f"{place}.source",
                    f"'{term.source}' is not a source of this recipe, which names none; write the source here, e.g. "
                    "{use: pairs, …}, or name it under `sources:`.",
                )
            if isinstance(term.source, str) and term.source not in recipe.sources:
                raise unknown_name(parts.at(f"{place}.source"), term.source, "a source of this recipe", recipe.sources)
    mistakes.raise_any()


def _check_adapters_trained(recipe: RecipeKeys, parts: Parts) -> None:
    """Each term trains adapters of the recipe, and each adapter is trained or continued from another run."""
    for index, term in enumerate(recipe.objectives):
        for name in term.trains or []:
            if name not in recipe.adapters:
                where = parts.at(f"objectives[{index}].trains")
                raise unknown_name(where, name, "an adapter of this recipe", recipe.adapters)
    for name in recipe.adapters:
        if recipe.start_from is None and name not in recipe.trained:
            raise parts.refuse(
                f"adapters.{name}",
                "no term trains it, and there is no `start_from` that it could come from; name it in a term's "
                "`trains`, or take it out",
            )


def _check_reference(recipe: RecipeKeys, parts: Parts) -> None:
    if recipe.reference == "start_from" and recipe.start_from is None:
        raise parts.refuse(
            "reference",
            "'start_from', but this recipe starts from nothing; add `start_from: RUN`, or leave `reference` out",
        )


def _check_dtype(recipe: RecipeKeys, parts: Parts) -> None:
    if recipe.backbone.options.get("dtype") == "float16":
        raise parts.refuse(
            "backbone.dtype",
            "'float16' is for drawing: gradients are not scaled here; train in bfloat16 or float32",
        )


def _check_rates(recipe: RecipeKeys, parts: Parts) -> None:
    """Rates by name must name every adapter that is trained, and no others."""
    rates = recipe.optimizer.learning_rate
    if isinstance(rates, dict):
        for name in [*rates, *recipe.adapters]:
            if name not in recipe.adapters:
                raise unknown_name(
                    parts.at("optimizer.learning_rate"), name, "an adapter of this recipe", recipe.adapters
                )
            if name not in rates and name in recipe.trained:
                raise parts.refuse("optimizer.learning_rate", f"it names no rate for the adapter '{name}'")


def _check_trackers(recipe: RecipeKeys, parts: Parts) -> None:
    for index, name in enumerate(recipe.track):
        if name not in TRACKERS:
            raise unknown_name(parts.at(f"track[{index}]"), name, "a tracker", TRACKERS)
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise parts.refuse(
                f"track[{index}]",
                f"'{name}' is not installed; run `pip install {TRACKERS[name]}`, or take it out of the list.",
            )


def _check_samples(recipe: RecipeKeys, parts: Parts) -> None:
    check_file(recipe.sample.prompts, "sample.prompts", parts)


def check_file(name: Any, place: str, parts: Parts) -> None:
    """A data set or list of prompts that can only be a path must exist; other names are for the hub to find."""
    if isinstance(name, str) and not name.startswith("builtin:"):
        allowed = "another path, a name on the hub (owner/name), or a builtin"
        local_or_hub(name, where=f"{parts.at(place)}:", allowed=allowed)
