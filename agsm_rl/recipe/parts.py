"""Makes what a recipe's blocks name: classes by their registered names, and objects from completed options.

Constructors check their arguments, and read no data or weights until the object is bound, attached or called. That is
why a recipe is checked by constructing its parts, and why each run constructs its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from agsm_rl import registry
from agsm_rl.errors import MistakesSoFar, UserError, combined
from agsm_rl.recipe.options import unknown_key, validated
from agsm_rl.recipe.rewards import RewardEntry, in_evaluation, in_source
from agsm_rl.recipe.schema import Block, Evaluate, RecipeKeys

if TYPE_CHECKING:
    from agsm_rl.interfaces import Reward
    from agsm_rl.policy import Objective, Source, View
    from agsm_rl.training.scoring import WeightedReward


class TermParts(NamedTuple):
    """What a term of a recipe consists of."""

    objective: Objective
    source: Source
    view: View | None


class Parts:
    """Loads and constructs what blocks name, for the recipe in file `where`, within what the command line allows.

    Args:
        where: The recipe's file; messages begin with it.
        allow_imports: Modules, commands and hosts that the command line allows (registry.permissions).
    """

    def __init__(self, *, where: str, allow_imports: Collection[str] = ()) -> None:
        self.where = where
        self.allow_imports = allow_imports

    def at(self, place: str) -> str:
        """A place in the recipe, for messages."""
        return f"{self.where}: {place}"

    def refuse(self, place: str, message: str) -> UserError:
        """The error for a mistake at a place of the recipe."""
        return UserError(f"{self.at(place)}: {message}")

    def load(self, kind: str, name: str, place: str) -> Any:
        """The class of that name; for a function used as a reward, a callable that makes the reward."""
        loaded = registry.load(kind, name, where=self.at(place), allow_imports=self.allow_imports)
        if kind != "rewards":
            return loaded
        from agsm_rl_rewards.functions import reward_maker

        return reward_maker(loaded)

    def complete(self, kind: str, block: Block, place: str) -> Block:
        """The block with its class's defaults filled in."""
        keys = {key: getattr(block, key) for key in type(block).model_fields}
        cls = self.load(kind, block.use, f"{place}.use")
        options = validated(cls, block.options, where=self.at(place), beside=keys)
        if "rewards" in options:
            try:
                entries = in_source(options["rewards"])
            except UserError as error:
                raise self.refuse(place, str(error)) from error
            mistakes = MistakesSoFar(self.where)
            completed: list[RewardEntry] = []
            for entry in entries:
                with mistakes.collected():
                    completed.append(self.complete_reward(entry, f"{place}.rewards.{entry.key}"))
            mistakes.raise_any()
            options["rewards"] = {entry.key: entry.to_data() for entry in completed}
        return type(block)(**keys, **options)

    def construct(self, kind: str, block: Block, place: str, *, seed: int) -> Any:
        """The object that a completed block describes; `seed` is the recipe's, for blocks without one."""
        options = block.options
        if "rewards" in options:
            options["rewards"] = [
                self.weighted_reward(entry, f"{place}.rewards.{entry.key}") for entry in in_source(options["rewards"])
            ]
        if "seed" in options and options["seed"] is None:
            options["seed"] = seed
        from agsm_rl.policy import Objective, Source, View
        from agsm_rl.training.defaults import with_defaults

        part = self.call(self.load(kind, block.use, f"{place}.use"), options, place)
        base = {"objectives": Objective, "sources": Source, "views": View}.get(kind)
        return part if base is None else with_defaults(part, base)

    def adapters(self, recipe: RecipeKeys) -> dict[str, Any]:
        """A completed recipe's adapters by name, attached to nothing yet."""
        return {
            name: self.construct("adapters", block, f"adapters.{name}", seed=recipe.seed)
            for name, block in recipe.adapters.items()
        }

    def terms(self, recipe: RecipeKeys) -> list[TermParts]:
        """The parts of each term of a completed recipe.

        Terms that name the same source share one object, so that a batch is drawn once.
        """
        shared = {
            name: self.construct("sources", block, f"sources.{name}", seed=recipe.seed)
            for name, block in recipe.sources.items()
        }
        return [self.term(recipe, index, shared) for index in range(len(recipe.objectives))]

    def term(self, recipe: RecipeKeys, index: int, shared: Mapping[str, Source]) -> TermParts:
        """The parts of one term; `shared` holds the sources that have names."""
        term, place = recipe.objectives[index], f"objectives[{index}]"
        objective = self.construct("objectives", term, place, seed=recipe.seed)
        if isinstance(term.source, str):
            source = shared[term.source]
        else:
            source = self.construct("sources", term.source, f"{place}.source", seed=recipe.seed)
        view = None
        if term.view is not None:
            view = self.construct("views", term.view, f"{place}.view", seed=recipe.seed)
        return TermParts(objective, source, view)

    def reward(self, name: str, place: str, options: dict[str, Any]) -> Any:
        """The reward of that name; UserError where it would do what the command line does not allow."""
        maker = self.load("rewards", name, place)
        registry.check_permissions(maker, options, where=self.at(place), allow_imports=self.allow_imports)
        from agsm_rl_rewards.functions import as_reward

        from agsm_rl.interfaces import Reward
        from agsm_rl.training.defaults import with_defaults

        reward = self.call(maker, options, place)
        try:
            return with_defaults(as_reward(reward), Reward)
        except UserError as error:
            raise self.refuse(place, str(error)) from error

    def evaluated_rewards(self, evaluate: Evaluate, place: str = "evaluate") -> dict[str, Reward]:
        """The rewards of a completed evaluation, by the names under which they are reported."""
        rewards = {}
        for name, block in evaluate.blocks.items():
            at = place if evaluate.suites is None else f"{place}.suites.{name}"
            for entry in in_evaluation(block.rewards):
                key = entry.name if evaluate.suites is None else f"{name}/{entry.name}"
                rewards[key] = self.reward(entry.use, f"{at}.rewards.{entry.key}", entry.options)
        return rewards

    def call(self, maker: Any, options: dict[str, Any], place: str) -> Any:
        """`maker(**options)`; its errors name the place, and `seed: null` leaves it its own default."""
        if options.get("seed", 0) is None:
            options = {key: value for key, value in options.items() if key != "seed"}
        try:
            return maker(**options)
        except UserError as error:
            raise self.refuse(place, str(error)) from error
        except (Exception, SystemExit) as error:  # whatever a user's constructor raises
            raise self.refuse(place, f"{type(error).__name__}: {error}") from error

    def complete_reward(self, entry: RewardEntry, place: str) -> RewardEntry:
        """The entry with its class's defaults filled in."""
        maker = self.load("rewards", entry.use, place + (".use" if entry.use != entry.key else ""))
        arguments = inspect.signature(maker).parameters.values()
        known = [
            argument.name
            for argument in arguments
            if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
        ]
        unknown = [key for key in entry.options if key not in known]
        if unknown:
            allowed = [*known, *entry.own_keys]
            raise combined(self.where, [f"{self.at(place)}: {unknown_key(key, allowed)}" for key in unknown])
        return replace(entry, options=validated(maker, entry.options, where=self.at(place)))

    def weighted_reward(self, entry: RewardEntry, place: str) -> WeightedReward:
        """The reward of a completed entry, and how it enters the sum."""
        from agsm_rl.training.scoring import WeightedReward

        return WeightedReward(
            self.reward(entry.use, place, entry.options), entry.weight, entry.name, normalise=entry.normalise
        )
