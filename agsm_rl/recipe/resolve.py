"""Complete a recipe and refuse what cannot work, before anything is loaded: names, options, and what goes with what.

Objectives, sources, rewards and adapters are constructed here, because their constructors check their arguments; none
of them reads data or weights until it is bound, attached or called.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from agsm_rl import registry
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.files import local_or_hub
from agsm_rl.recipe.options import unknown_key, validated
from agsm_rl.recipe.rewards import SCORES, RewardEntry, in_evaluation, in_source
from agsm_rl.recipe.schema import Block, Evaluate, RecipeKeys, TermBlock, refuse

if TYPE_CHECKING:
    from agsm_rl.interfaces import Batch
    from agsm_rl.training.scoring import WeightedReward

Keys = TypeVar("Keys", bound=RecipeKeys)

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


def resolve(recipe: Keys, *, where: str = "recipe", allow_imports: Collection[str] = ()) -> Keys:
    """The recipe with every default filled in; UserError with the place of the first thing that cannot work."""
    parts = Parts(where=where, allow_imports=allow_imports)
    backbone = parts.complete("backbones", recipe.backbone, "backbone")
    adapters = {name: parts.complete("adapters", block, f"adapters.{name}") for name, block in recipe.adapters.items()}
    sources = {name: parts.complete("sources", block, f"sources.{name}") for name, block in recipe.sources.items()}
    done = recipe.model_copy(update={"backbone": backbone, "adapters": adapters, "sources": sources})
    if recipe.evaluate is not None:
        done.evaluate = complete_evaluation(recipe.evaluate, parts)
    done.objectives = _complete_terms(done, parts)
    made = [
        parts.construct("adapters", block, f"adapters.{name}", seed=recipe.seed) for name, block in adapters.items()
    ]
    if done.evaluate is not None:
        from agsm_rl.policy import check_bank

        check_bank(done.evaluate.bank, made, where=f"{where}: evaluate.bank")
    _check_terms(done, parts, made)
    _check_rest(done, parts)
    return done


class Parts:
    """Makes the classes and objects that a recipe's blocks name; `where` is the recipe's file, for messages."""

    def __init__(self, *, where: str, allow_imports: Collection[str] = ()) -> None:
        self.where = where
        self.allow_imports = allow_imports

    def load(self, kind: str, name: str, place: str) -> Any:
        """The class behind a name; behind a function as a reward, what makes that reward."""
        found = registry.load(kind, name, where=f"{self.where}: {place}", allow_imports=self.allow_imports)
        if kind != "rewards":
            return found
        from agsm_rl_rewards.functions import reward_maker

        return reward_maker(found)

    def complete(self, kind: str, block: Block, place: str) -> Block:
        """The block with its class's defaults filled in."""
        found = self.load(kind, block.use, f"{place}.use")
        options = validated(found, block.options, where=f"{self.where}: {place}")
        own = {key: getattr(block, key) for key in type(block).model_fields}
        if "rewards" in options:
            try:
                entries = in_source(options["rewards"])
            except UserError as error:
                raise refuse(self.where, place, str(error)) from error
            done = [self.complete_reward(entry, f"{place}.rewards.{entry.key}") for entry in entries]
            options["rewards"] = {entry.key: entry.to_data() for entry in done}
        return type(block)(**own, **options)

    def construct(self, kind: str, block: Block, place: str, *, seed: int) -> Any:
        """The object that a completed block describes."""
        options = block.options
        if "rewards" in options:
            options["rewards"] = [
                self.weighted_reward(entry, f"{place}.rewards.{entry.key}") for entry in in_source(options["rewards"])
            ]
        if "seed" in options and options["seed"] is None:
            options["seed"] = seed
        from agsm_rl.interfaces import with_defaults
        from agsm_rl.policy import Objective, Source, View

        made = self.call(self.load(kind, block.use, f"{place}.use"), options, place)
        base = {"objectives": Objective, "sources": Source, "views": View}.get(kind)
        return made if base is None else with_defaults(made, base)

    def reward(self, name: str, place: str, options: dict[str, Any]) -> Any:
        """The reward of that name."""
        found = self.load("rewards", name, place)
        registry.check_permissions(found, options, where=f"{self.where}: {place}", allow_imports=self.allow_imports)
        from agsm_rl_rewards.functions import as_reward

        from agsm_rl.interfaces import Reward, with_defaults

        made = self.call(found, options, place)
        try:
            return with_defaults(as_reward(made), Reward)
        except UserError as error:
            raise refuse(self.where, place, str(error)) from error

    def call(self, found: Any, options: dict[str, Any], place: str) -> Any:
        """`found(**options)`, its complaints told with their place; a seed that nobody gave is its own default."""
        if options.get("seed", 0) is None:
            options = {key: value for key, value in options.items() if key != "seed"}
        try:
            return found(**options)
        except UserError as error:
            raise refuse(self.where, place, str(error)) from error
        except (Exception, SystemExit) as error:  # whatever a user's constructor raises
            raise refuse(self.where, place, f"{type(error).__name__}: {error}") from error

    def complete_reward(self, entry: RewardEntry, place: str) -> RewardEntry:
        """The entry with its class's defaults filled in."""
        found = self.load("rewards", entry.use, place + (".use" if entry.use != entry.key else ""))
        arguments = inspect.signature(found).parameters.values()
        known = [one.name for one in arguments if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        for key in entry.options:
            if key not in known:
                raise refuse(self.where, place, unknown_key(key, [*known, *entry.own_keys]))
        return replace(entry, options=validated(found, entry.options, where=f"{self.where}: {place}"))

    def weighted_reward(self, entry: RewardEntry, place: str) -> WeightedReward:
        """The reward of a completed entry, and how it enters the sum."""
        from agsm_rl.training.scoring import WeightedReward

        return WeightedReward(
            self.reward(entry.use, place, entry.options), entry.weight, entry.name, normalise=entry.normalise
        )


def source_of(recipe: RecipeKeys, index: int) -> tuple[Block, str]:
    """The source of a term and the place where it stands in the recipe."""
    source = recipe.objectives[index].source
    return (
        (recipe.sources[source], f"sources.{source}")
        if isinstance(source, str)
        else (source, f"objectives[{index}].source")
    )


def complete_evaluation(evaluate: Evaluate, parts: Parts, *, place: str = "evaluate") -> Evaluate:
    """The section with its rewards by name, their options filled in and checked: each is constructed."""
    try:
        entries = in_evaluation(evaluate.rewards)
    except UserError as error:
        raise UserError(f"{parts.where}: {place}.{error}") from error
    done = {}
    for index, entry in enumerate(entries):
        which = f".{entry.key}" if isinstance(evaluate.rewards, dict) else f"[{index}]"
        found = parts.complete_reward(entry, f"{place}.rewards{which}")
        parts.reward(found.use, f"{place}.rewards{which}", found.options)
        done[found.key] = found.to_data()
    return evaluate.model_copy(update={"rewards": done})


def _check_rules(recipe: RecipeKeys, parts: Parts) -> None:
    """`checkpoint.best` and `stop_when` name what is evaluated while the run goes on."""
    wanted = {"checkpoint.best": recipe.checkpoint.best} if recipe.checkpoint.best else {}
    wanted |= {f"stop_when.{name}": name for name in recipe.stop_when}
    for place, name in wanted.items():
        if recipe.evaluate is None or recipe.evaluate.every is None:
            raise refuse(
                parts.where, place, f"'{name}' is not measured while the run goes on; set evaluate.every, e.g. 50"
            )
        allowed = [*(entry.name for entry in in_evaluation(recipe.evaluate.rewards)), *SCORES]
        if name not in allowed:
            raise unknown_name(f"{parts.where}: {place}", name, "a score of the suite or in evaluate.rewards", allowed)


def _complete_terms(recipe: RecipeKeys, parts: Parts) -> list[TermBlock]:
    terms: list[TermBlock] = []
    names = _names(recipe.objectives)
    for index, term in enumerate(recipe.objectives):
        place = f"objectives[{index}]"
        done = parts.complete("objectives", term, place)
        assert isinstance(done, TermBlock)
        if done.name is None:
            done.name = names[index]
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


def _names(terms: Sequence[TermBlock]) -> dict[int, str]:
    """By its place, the name of each term that has none.

    Noise hangs on the name, so those that never learn are named last: a term of weight 0 is as no term.
    """
    taken = {term.name for term in terms}
    names = {}
    for index in sorted(range(len(terms)), key=lambda index: _never_learns(terms[index])):
        if terms[index].name is None:
            names[index] = _free_name(terms[index].use.rpartition(":")[2], taken)
            taken.add(names[index])
    return names


def _never_learns(term: TermBlock) -> bool:
    weights = term.weight.values() if isinstance(term.weight, dict) else [term.weight]
    return not any(weights)


def _free_name(use: str, taken: Collection[str | None]) -> str:
    """agsm, agsm_2, agsm_3, …: the first that is free."""
    count = 1
    while (name := use if count == 1 else f"{use}_{count}") in taken:
        count += 1
    return name


def _check_terms(recipe: RecipeKeys, parts: Parts, adapters: list[Any]) -> None:
    from agsm_rl.sources.cache import check_text_stays
    from agsm_rl.trainer import check_range, check_view

    for index, term in enumerate(recipe.objectives):
        place = f"objectives[{index}]"
        objective = parts.construct("objectives", term, place, seed=recipe.seed)
        check_range(term.t, objective, where=f"{parts.where}: {place}.t")
        block, source_place = source_of(recipe, index)
        _check_path(block, parts, source_place)
        source = parts.construct("sources", block, source_place, seed=recipe.seed)
        if source.cache == "all":
            check_text_stays(adapters, where=f"{parts.where}: {source_place}.cache")
        gives, batch_size = source.gives, source.batch_size
        if term.view is not None:
            view = parts.construct("views", term.view, f"{place}.view", seed=recipe.seed)
            if not issubclass(gives, view.consumes):
                raise _mismatch(term.view.use, block, view.consumes, gives, parts, f"{place}.view")
            check_view(view, source, where=f"{parts.where}: {place}.view")
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
    for name in recipe.adapters:
        if recipe.start_from is None and name not in recipe.trained:
            raise refuse(
                parts.where,
                f"adapters.{name}",
                "no term trains it, and there is no `start_from` that it could come from; name it in a term's "
                "`trains`, or take it out",
            )


def _check_path(block: Block, parts: Parts, place: str) -> None:
    """A data set or list of prompts that can only be a path must exist; other names are for the hub to find."""
    for key in ("dataset", "prompts"):
        name = block.options.get(key)
        if isinstance(name, str) and not name.startswith("builtin:"):
            allowed = "another path, a name on the hub (owner/name), or a builtin"
            local_or_hub(name, where=f"{parts.where}: {place}.{key}:", allowed=allowed)


def _mismatch(use: str, block: Block, consumes: type[Batch], gives: type[Batch], parts: Parts, place: str) -> UserError:
    fitting = registry.names_that("sources", lambda found: issubclass(found.gives, consumes))
    works = f"sources that work: {', '.join(fitting)}" if fitting else "no installed source gives that"
    views = registry.names_that("views", lambda found: issubclass(found.gives, consumes))
    works += f"; views that work: {', '.join(map(_view_of, views))}" if views else ""
    return refuse(
        parts.where,
        place,
        f"'{use}' learns from a {consumes.__name__}, but '{block.use}' gives a {gives.__name__}; "
        f"{works}{consumes.given_by}.",
    )


def _view_of(view: str) -> str:
    """The view and the sources that it can be set on."""
    wanted = registry.load("views", view, where=view).consumes
    sources = registry.names_that("sources", lambda found: issubclass(found.gives, wanted))
    return f"{view} of {' or '.join(sources)}" if sources else view


def _check_rest(recipe: RecipeKeys, parts: Parts) -> None:
    from agsm_rl.training.combine import find_combiner

    if recipe.backbone.options.get("dtype") == "float16":
        raise refuse(
            parts.where,
            "backbone.dtype",
            "'float16' is for drawing: gradients are not scaled here; train in bfloat16 or float32",
        )
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
            if name not in rates and name in recipe.trained:
                raise refuse(parts.where, "optimizer.learning_rate", f"it names no rate for the adapter '{name}'")
    _check_rules(recipe, parts)
    for index, name in enumerate(recipe.track):
        place = f"{parts.where}: track[{index}]"
        if name not in TRACKERS:
            raise unknown_name(place, name, "a tracker", TRACKERS)
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise UserError(
                f"{place}: '{name}' is not installed; run `pip install {TRACKERS[name]}`, or take it out of the list."
            )
