"""Complete a recipe and refuse what cannot work, before anything is loaded: names, options, and what goes with what.

Objectives, sources, rewards and adapters are constructed here, because their constructors check their arguments; none
of them reads data or weights until it is bound, attached or called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

from agsm_rl import registry
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.options import RewardOptions, validated
from agsm_rl.recipe import Block, Recipe, TermBlock, refuse

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


def resolve(recipe: Recipe, *, where: str = "recipe", allow_imports: Collection[str] = ()) -> Recipe:
    """The recipe with every default filled in; UserError with the place of the first thing that cannot work."""
    parts = Parts(where=where, allow_imports=allow_imports)
    backbone = parts.complete("backbones", recipe.backbone, "backbone")
    adapters = {name: parts.complete("adapters", block, f"adapters.{name}") for name, block in recipe.adapters.items()}
    sources = {name: parts.complete("sources", block, f"sources.{name}") for name, block in recipe.sources.items()}
    done = recipe.model_copy(update={"backbone": backbone, "adapters": adapters, "sources": sources})
    done.objectives = _complete_terms(done, parts)
    for name, block in adapters.items():
        parts.construct("adapters", block, f"adapters.{name}", seed=recipe.seed)
    _check_terms(done, parts)
    _check_rest(done, parts)
    return done


class Parts:
    """Makes the classes and objects that a recipe's blocks name; `where` is the recipe's file, for messages."""

    def __init__(self, *, where: str, allow_imports: Collection[str] = ()) -> None:
        self.where = where
        self.allow_imports = allow_imports

    def load(self, kind: str, name: str, place: str) -> Any:
        """The class behind a name; behind a function in the manner of TRL's rewards, what makes its reward."""
        found = registry.load(kind, name, where=f"{self.where}: {place}", allow_imports=self.allow_imports)
        if kind != "rewards":
            return found
        from agsm_rl_rewards.trl_style import is_trl_style, maker

        return maker(found) if is_trl_style(found) else found

    def complete(self, kind: str, block: Block, place: str) -> Block:
        """The block with its class's defaults filled in."""
        found = self.load(kind, block.use, f"{place}.use")
        options = validated(found, block.options, where=f"{self.where}: {place}")
        own = {key: getattr(block, key) for key in type(block).model_fields}
        if "rewards" in options:
            options["rewards"] = self._complete_rewards(options["rewards"], f"{place}.rewards")
        return type(block)(**own, **options)

    def construct(self, kind: str, block: Block, place: str, *, seed: int) -> Any:
        """The object that a completed block describes."""
        options = block.options
        if "rewards" in options:
            options["rewards"] = [
                (self.reward(name, f"{place}.rewards.{name}", _reward_options(value)), _reward_weight(value))
                for name, value in options["rewards"].items()
            ]
        if "seed" in options and options["seed"] is None:
            options["seed"] = seed
        return self.call(self.load(kind, block.use, f"{place}.use"), options, place)

    def reward(self, name: str, place: str, options: dict[str, Any]) -> Any:
        """The reward of that name."""
        return self.call(self.load("rewards", name, place), options, place)

    def call(self, found: Any, options: dict[str, Any], place: str) -> Any:
        """`found(**options)`, its complaints told with their place."""
        try:
            return found(**options)
        except UserError as error:
            raise refuse(self.where, place, str(error)) from error
        except (ValueError, TypeError) as error:
            raise refuse(self.where, place, f"{type(error).__name__}: {error}") from error

    def _complete_rewards(self, rewards: dict[str, Any], place: str) -> dict[str, Any]:
        done: dict[str, Any] = {}
        for name, value in rewards.items():
            found = self.load("rewards", name, f"{place}.{name}")
            options = validated(found, _reward_options(value), where=f"{self.where}: {place}.{name}")
            done[name] = {"weight": _reward_weight(value), **options} if options else _reward_weight(value)
        return done


def _reward_weight(value: Any) -> float:
    return RewardOptions.model_validate(value).weight if isinstance(value, dict) else float(value)


def _reward_options(value: Any) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != "weight"} if isinstance(value, dict) else {}


def source_of(recipe: Recipe, index: int) -> tuple[Block, str]:
    """The source of a term and the place where it stands in the recipe."""
    source = recipe.objectives[index].source
    return (
        (recipe.sources[source], f"sources.{source}")
        if isinstance(source, str)
        else (source, f"objectives[{index}].source")
    )


def _complete_terms(recipe: Recipe, parts: Parts) -> list[TermBlock]:
    terms: list[TermBlock] = []
    taken = {term.name for term in recipe.objectives}
    for index, term in enumerate(recipe.objectives):
        place = f"objectives[{index}]"
        done = parts.complete("objectives", term, place)
        assert isinstance(done, TermBlock)
        if done.name is None:
            done.name = _free_name(done.use.rpartition(":")[2], taken)
            taken.add(done.name)
        elif done.name in {known.name for known in terms}:
            raise refuse(parts.where, f"{place}.name", f"'{done.name}' is the name of another term; give each its own")
        if isinstance(done.source, Block):
            done.source = parts.complete("sources", done.source, f"{place}.source")
        elif done.source not in recipe.sources:
            where = f"{parts.where}: {place}.source"
            if not recipe.sources:
                raise UserError(
                    f"{where}: '{done.source}' is not a source of this recipe, which names none; write the source "
                    f"here, e.g. {{use: pairs, …}}, or name it under `sources:`."
                )
            raise unknown_name(where, done.source, "a source of this recipe", recipe.sources)
        if done.view is not None:
            done.view = parts.complete("views", done.view, f"{place}.view")
        terms.append(done)
    return terms


def _free_name(use: str, taken: Collection[str | None]) -> str:
    """agsm, agsm_2, agsm_3, …: the first that is free."""
    count = 1
    while (name := use if count == 1 else f"{use}_{count}") in taken:
        count += 1
    return name


def _check_terms(recipe: Recipe, parts: Parts) -> None:
    for index, term in enumerate(recipe.objectives):
        place = f"objectives[{index}]"
        objective = parts.construct("objectives", term, place, seed=recipe.seed)
        block, source_place = source_of(recipe, index)
        _check_path(block, parts, source_place)
        source = parts.construct("sources", block, source_place, seed=recipe.seed)
        gives, batch_size = source.gives, getattr(source, "batch_size", None)
        if term.view is not None:
            view = parts.construct("views", term.view, f"{place}.view", seed=recipe.seed)
            if not issubclass(gives, view.consumes):
                raise _mismatch(term.view.use, block, view.consumes, gives, parts, f"{place}.view")
            gives, batch_size = view.gives, None if batch_size is None else view.batch_size(batch_size)
        if not issubclass(gives, objective.consumes):
            raise _mismatch(term.use, term.view or block, objective.consumes, gives, parts, f"{place}.source")
        if batch_size is not None:
            try:
                objective.check(batch_size)
            except UserError as error:
                raise refuse(parts.where, f"{place} on {source_place}", str(error)) from error
        for name in term.trains or []:
            if name not in recipe.adapters:
                raise unknown_name(f"{parts.where}: {place}.trains", name, "an adapter of this recipe", recipe.adapters)


def _check_path(block: Block, parts: Parts, place: str) -> None:
    """A data set that can only be a path must exist; other names are for `datasets` to find."""
    dataset = block.options.get("dataset")
    if not isinstance(dataset, str) or Path(dataset).expanduser().exists():
        return
    if dataset.startswith((".", "/", "~")) or dataset.endswith((".parquet", ".csv", ".json", ".jsonl")):
        raise refuse(
            parts.where,
            f"{place}.dataset",
            f"'{dataset}' does not exist (looked from {Path.cwd()}); give a folder of images with metadata.jsonl, "
            "a parquet file, a name that `datasets` knows, or a builtin such as builtin:shapes.",
        )


def _mismatch(use: str, block: Block, consumes: type, gives: type, parts: Parts, place: str) -> UserError:
    fitting = registry.names_that("sources", lambda found: issubclass(found.gives, consumes))
    works = f"sources that work: {', '.join(fitting)}" if fitting else "no installed source gives that"
    views = registry.names_that("views", lambda found: issubclass(found.gives, consumes))
    works += f"; views that work: {', '.join(map(_view_of, views))}" if views else ""
    return refuse(
        parts.where,
        place,
        f"'{use}' learns from a {consumes.__name__}, but '{block.use}' gives a {gives.__name__}; {works}.",
    )


def _view_of(view: str) -> str:
    """The view and the sources that it can be set on."""
    wanted = registry.load("views", view, where=view).consumes
    sources = registry.names_that("sources", lambda found: issubclass(found.gives, wanted))
    return f"{view} of {' or '.join(sources)}" if sources else view


def _check_rest(recipe: Recipe, parts: Parts) -> None:
    from agsm_rl.combine import find_combiner

    try:
        find_combiner(recipe.combine)
    except UserError as error:
        raise UserError(f"{parts.where}: {error}") from error
    rates = recipe.optimizer.learning_rate
    if isinstance(rates, dict):
        for name in [*rates, *recipe.adapters]:
            if name not in recipe.adapters:
                raise unknown_name(
                    f"{parts.where}: optimizer.learning_rate", name, "an adapter of this recipe", recipe.adapters
                )
            if name not in rates:
                raise refuse(parts.where, "optimizer.learning_rate", f"it names no rate for the adapter '{name}'")
    for index, name in enumerate(recipe.evaluate.rewards if recipe.evaluate else []):
        parts.reward(name, f"evaluate.rewards[{index}]", {})
    for index, name in enumerate(recipe.track):
        place = f"{parts.where}: track[{index}]"
        if name not in TRACKERS:
            raise unknown_name(place, name, "a tracker", TRACKERS)
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise UserError(
                f"{place}: '{name}' is not installed; run `pip install {TRACKERS[name]}`, or take it out of the list."
            )
