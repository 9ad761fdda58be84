"""The suites of a recipe: completed, constructed, and the scores that rules may name."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from agsm_rl import registry
from agsm_rl.errors import MistakesSoFar, UserError, unknown_name
from agsm_rl.recipe.options import validated
from agsm_rl.recipe.reward_specs import RewardSpec, spec_of
from agsm_rl.recipe.rewards import in_evaluation
from agsm_rl.recipe.schema import Evaluate, SuiteBlock

if TYPE_CHECKING:
    from agsm_rl.recipe.parts import Parts

NEEDED = ("name", "prompts", "judge", "result", "parts", "join", "score_names", "check_base", "draw")


@dataclass(frozen=True)
class MadeSuite:
    """A suite of a recipe.

    Attributes:
        name: Its name in the recipe.
        suite: The suite (evaluate.suite.Suite).
        rewards: Further rewards to measure on its images.
        final_only: It is measured at the end of the run only.
        alone: It is the short form's, whose scores have no prefix.
    """

    name: str
    suite: Any
    rewards: list[RewardSpec]
    final_only: bool = False
    alone: bool = False

    def score_names(self) -> list[str]:
        """The names of its scores, without its own."""
        return [*self.suite.score_names(), *(spec.label for spec in self.rewards)]

    def key(self, score: str) -> str:
        """A score's name in a run's rules and records."""
        return score if self.alone else f"{self.name}/{score}"

    def full_names(self) -> list[str]:
        """The names of all its scores."""
        return [self.key(score) for score in self.score_names()]

    def smaller_is_better(self) -> set[str]:
        """The names of those of which less is better."""
        return {self.key(score) for score in self.suite.smaller_is_better}


def complete_suite(block: SuiteBlock, parts: Parts, place: str) -> SuiteBlock:
    """The block with the defaults of its suite and its rewards filled in."""
    suite = parts.load("suites", block.use, f"{place}.use")
    options = _completed(suite, block.options, where=parts.at(place))
    return SuiteBlock(
        use=block.use, final_only=block.final_only, rewards=complete_rewards(block, parts, place), **options
    )


def complete_rewards(block: SuiteBlock | Evaluate, parts: Parts, place: str) -> dict[str, Any]:
    """`rewards` by name with their options filled in; each is constructed once, to check its arguments."""
    try:
        entries = in_evaluation(block.rewards)
    except UserError as error:
        raise UserError(f"{parts.at(place)}.{error}") from error
    rewards, mistakes = {}, MistakesSoFar(parts.where)
    for index, entry in enumerate(entries):
        key = f".{entry.key}" if isinstance(block.rewards, dict) else f"[{index}]"
        with mistakes.collected():
            completed = parts.complete_reward(entry, f"{place}.rewards{key}")
            parts.reward(completed.use, f"{place}.rewards{key}", completed.options)
            rewards[completed.key] = completed.to_data()
    mistakes.raise_any()
    return rewards


def make_suites(evaluate: Evaluate, parts: Parts, place: str = "evaluate") -> list[MadeSuite]:
    """The suites of a completed evaluation; UserError where one cannot be constructed."""
    alone = evaluate.suites is None
    made = []
    for name, block in evaluate.blocks.items():
        at = place if alone else f"{place}.suites.{name}"
        specs = [spec_of(entry, parts, f"{at}.rewards.{entry.key}") for entry in in_evaluation(block.rewards)]
        options = block.options
        inherited = {"seed": evaluate.seed, "split": evaluate.split}
        if str(options.get("prompts")).startswith("builtin:") and not options.get("form"):
            inherited["prompt_split"] = evaluate.split
        options |= {key: value for key, value in inherited.items() if options.get(key, 0) is None}
        registered = parts.load("suites", block.use, f"{at}.use")
        is_of_rewards = _takes_rewards(registered)
        if is_of_rewards and not specs and _needs_rewards(registered):
            raise parts.refuse(at, f"the suite '{block.use}' measures rewards; add e.g. rewards: {{clip_score: {{}}}}")
        suite = construct(block.use, options | ({"rewards": specs} if is_of_rewards else {}), parts, at)
        if options.get("prompts", 0) is None:
            try:
                suite.prompts()  # which refuses to have none
            except UserError as error:
                raise parts.refuse(at, str(error)) from error
        entry = MadeSuite(name, suite, [] if is_of_rewards else specs, block.final_only, alone)
        _check_names(entry, parts, at)
        made.append(entry)
    return made


def construct(use: str, options: Mapping[str, Any], parts: Parts, place: str) -> Any:
    """The suite with these options; UserError if it may not do what it does, or is not a suite."""
    registered = parts.load("suites", use, f"{place}.use")
    registry.check_permissions(registered, options, where=parts.at(place), allow_imports=parts.allow_imports)
    suite = parts.call(registered, dict(options), place)
    lacking = [name for name in NEEDED if not hasattr(suite, name)]
    if lacking:
        raise parts.refuse(
            place, f"'{use}' has no `{lacking[0]}`; a suite's class inherits agsm_rl.evaluate.suite.Suite"
        )
    return suite


def scores_of(suites: Collection[MadeSuite]) -> list[str]:
    """The full names of all scores that rules may use, in the order of the suites."""
    return [key for entry in suites for key in entry.full_names()]


def find_score(name: str, suites: Collection[MadeSuite], *, where: str) -> str:
    """The full name of a score: `suite/score`, or `score` alone where the first suite has it, or only one other.

    UserError, which suggests the nearest name, if there is no such score.
    """
    full = {f"{entry.name}/{score}": entry.key(score) for entry in suites for score in entry.score_names()}
    if name in full:
        return full[name]
    first = next(iter(suites), None)
    if first is not None and name in first.score_names():
        return first.key(name)
    having = [entry for entry in suites if name in entry.score_names()]
    if len(having) == 1:
        return having[0].key(name)
    allowed = sorted(scores_of(suites))
    near = get_close_matches(name, [score for entry in suites for score in entry.score_names()], n=1)
    if near and "/" not in name:
        meant = next(entry.key(near[0]) for entry in suites if near[0] in entry.score_names())
        raise UserError(
            f"{where}: '{name}' is not a score of the suite or in evaluate.rewards; allowed: {', '.join(allowed)}. "
            f"Did you mean '{meant}'?"
        )
    raise unknown_name(where, name, "a score of the suite or in evaluate.rewards", allowed)


def _completed(suite: Any, options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """A suite's own options, without `rewards`, which are completed by themselves."""
    stand_in = {"rewards": {"any": 1.0}} if _takes_rewards(suite) else {}
    completed = validated(suite, {**options, **stand_in}, where=where)
    return {key: value for key, value in completed.items() if key not in stand_in}


def _takes_rewards(suite: Any) -> bool:
    return "rewards" in inspect.signature(suite).parameters


def _needs_rewards(suite: Any) -> bool:
    parameter = inspect.signature(suite).parameters["rewards"]
    return parameter.default is parameter.empty


def _check_names(entry: MadeSuite, parts: Parts, place: str) -> None:
    """UserError if a reward has the name of one of the suite's own scores, whose rules could not tell them apart."""
    for spec in entry.rewards:
        if spec.label in entry.suite.score_names():
            raise parts.refuse(
                f"{place}.rewards.{spec.label}",
                f"this is the name of one of the suite's own scores; choose another, with `use: {spec.name}`",
            )
