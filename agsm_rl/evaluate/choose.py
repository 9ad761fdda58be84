"""Turns the options of `agsm-rl eval` into a suite."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agsm_rl import registry
from agsm_rl.errors import UserError
from agsm_rl.evaluate.prompts import PromptList
from agsm_rl.evaluate.reward_options import parse_rewards, rewards_of
from agsm_rl.evaluate.suite import Suite
from agsm_rl.evaluate.suite_options import ARGUMENTS, NAMES, SuiteOptions, arguments_of, entered
from agsm_rl.recipe.options import explain, validated
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.reward_specs import RewardSpec
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.recipe.suites import construct, make_suites
from agsm_rl.recipe.yaml_file import parse_yaml, read_yaml


def make_suite(
    suite: str,
    given: SuiteOptions,
    *,
    target: str,
    num_images: int | None,
    seed: int,
    allow_imports: Collection[str] = (),
) -> Suite:
    """The suite; UserError if its options are not usable.

    If `target` is a run folder, the rewards suite defaults to the run's own rewards and prompts.
    """
    given.check(suite, allow_imports)
    takes = arguments_of(suite, allow_imports)
    if num_images is not None and "num_images" not in takes:
        raise UserError(f"--num-images: the suite {suite} decides how many images it draws; leave the option out.")
    options = {name: value for name, value in given.given().items() if name not in ARGUMENTS}
    options |= named_values(given.option or (), flag="--option")
    options |= {} if num_images is None else {"num_images": num_images}
    options |= {} if "seed" not in takes else {"seed": seed} | options
    run = _evaluation_of_run(Path(target)) if "rewards" in takes else None
    rewards = {}
    if "rewards" in takes and (takes["rewards"].default is inspect.Parameter.empty or given.names_rewards()):
        rewards = {"rewards": _rewards(given, run, target, allow_imports)}
    _check_required(suite, takes, options | rewards)
    registered = registry.load("suites", suite, where="--suite", allow_imports=allow_imports)
    stand_in = {"rewards": {"any": 1.0}} if "rewards" in takes else {}
    complete = validated(registered, options | stand_in, where=f"--suite {suite}: ")
    parts = Parts(where=f"--suite {suite}", allow_imports=allow_imports)
    made: Suite = construct(
        suite, complete | ({"rewards": ()} if "rewards" in takes else {}) | rewards, parts, "options"
    )
    prompts = getattr(made, "list", None)
    if isinstance(prompts, PromptList):
        prompts.where = "--prompts"
        if run is not None and prompts.prompts is None:
            made.list = _prompts_of_run(run, num_images, allow_imports)  # type: ignore[attr-defined]
    return made


def _rewards(
    given: SuiteOptions, run: Evaluate | None, target: str, allow_imports: Collection[str]
) -> list[RewardSpec]:
    """Those that are named, or else the run's own."""
    if run is not None and not given.names_rewards() and any(block.rewards for block in run.blocks.values()):
        return rewards_of(run, where=str(Path(target) / "recipe.yaml"), allow_imports=allow_imports)
    return parse_rewards(given.reward or (), given.rewards_file, allow_imports=allow_imports)


def _prompts_of_run(run: Evaluate, num_images: int | None, allow_imports: Collection[str]) -> PromptList:
    """The prompts of a run's first suite, as many as it draws or as are asked for."""
    name, block = next(iter(run.blocks.items()))
    if num_images is not None and "num_images" in arguments_of(block.use, allow_imports):
        block = type(block).model_validate(block.model_dump() | {"num_images": num_images})
    first = Evaluate.model_validate({"suites": {name: block}, "seed": run.seed})
    suite = make_suites(first, Parts(where="the run's recipe.yaml", allow_imports=allow_imports))[0].suite
    rows = {index: dict(row) for index, row in suite.prompts().items()}
    return PromptList("the run's", num_given=num_images, _rows=rows)


def _check_required(suite: str, takes: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in options:
            how = entered(name) if name in NAMES else f"--option {name}=…"
            raise UserError(f"--suite {suite}: needs {how}; `agsm-rl list {suite}` says what it is.")


def named_values(given: Sequence[str], *, flag: str) -> dict[str, Any]:
    """`NAME=VALUE` texts of a repeatable option; values are YAML. UserError for another form."""
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{flag} {text:.200}: write {flag} NAME=VALUE.")
        options[key] = parse_yaml(value, where=f"{flag} {key}")
    return options


def _evaluation_of_run(target: Path) -> Evaluate | None:
    """The `evaluate` section of a run folder's recipe; None if there is none."""
    file = target / "recipe.yaml"
    if not file.is_file():
        return None
    try:
        section = read_yaml(file).get("evaluate")
        return None if section is None else Evaluate.model_validate(section)
    except ValidationError as error:
        raise explain(error, where=f"{file}: evaluate") from error
