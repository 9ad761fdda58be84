"""The options of `agsm-rl eval` that belong to single suites. Imports no suite until one is named."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from agsm_rl import registry
from agsm_rl.errors import UserError

ARGUMENTS = {"reward": "rewards", "rewards_file": "rewards"}
"""What a suite's constructor calls an option, where the command line has another name."""
ENTERED = {"rewards_file": "--rewards"}
"""What the command line calls an option, where it is not the name with hyphens."""


@dataclass(frozen=True)
class SuiteOptions:
    """Options that belong to single suites; None or empty if they are not given.

    Each goes to the argument of that name in the suite's constructor; `option` has those that have no name here.
    """

    split: str | None = None
    any_base: bool = False
    detector: str | None = None
    classifier: str | None = None
    reward: Sequence[str] | None = None
    rewards_file: Path | None = None
    prompts: str | None = None
    prompt_column: str | None = None
    prompt_split: str | None = None
    reference: str | None = None
    inception: str | None = None
    option: Sequence[str] | None = None

    def given(self) -> dict[str, Any]:
        """The options that are given, except `option`."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name)}

    def flags(self) -> dict[str, str]:
        """How each given option is written on the command line, by the name of the suite's argument."""
        named = [text.partition("=")[0] for text in self.option or ()]
        return {name: f"--option {name}" for name in named} | {
            ARGUMENTS.get(name, name): entered(name) for name in self.given()
        }

    def names_rewards(self) -> bool:
        """Whether a reward is named."""
        return bool(self.reward or self.rewards_file)

    def check(self, suite: str, allow_imports: Collection[str] = ()) -> None:
        """UserError for an unknown suite, or for an option that does not belong to it."""
        takes = arguments_of(suite, allow_imports)
        for name in self.given():
            if ARGUMENTS.get(name, name) not in takes:
                having = [other for other in registry.available("suites") if _takes(other, name)]
                raise UserError(f"{entered(name)}: goes with --suite {' or '.join(having)}, not with {suite}.")


NAMES = tuple(item.name for item in fields(SuiteOptions) if item.name != "option")


def arguments_of(suite: str, allow_imports: Collection[str] = ()) -> Mapping[str, inspect.Parameter]:
    """The arguments of a suite's constructor; UserError for an unknown suite."""
    registered = registry.load("suites", suite, where="--suite", allow_imports=allow_imports)
    return inspect.signature(registered).parameters


def entered(name: str) -> str:
    """How an option is written on the command line."""
    return ENTERED.get(name, "--" + name.replace("_", "-"))


def _takes(suite: str, name: str) -> bool:
    try:
        return ARGUMENTS.get(name, name) in arguments_of(suite)
    except UserError:  # another package's suite that cannot be imported
        return False
