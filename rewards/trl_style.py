"""Reward functions as today's TRL calls them, `f(prompts=…, completions=…, **columns)` → a list of scores, as rewards.

A recipe names such a function as `module:function` in its `rewards` (with `--allow-import module`) and needs no
wrapper: the columns are those of the prompts' file. From Python: `TRLReward(function)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agsm_rl_rewards.attributes import name_of
from agsm_rl_rewards.preprocessing import pictures
from agsm_rl_rewards.returned_scores import one_score_per_image
from torch import Tensor

from agsm_rl.errors import UserError

GIVEN = ("prompts", "completions")


class TRLReward:
    """Calls `function` by keyword with `prompts`, a list of texts, `completions`, a list of PIL images, and columns.

    The columns are the other ones of the prompts' file, as far as the function takes them (all of them with
    `**kwargs`), each as a list with one value per image; a value that a row lacks is None.

    Raises UserError if the function requires a column that the prompts do not have.

    Args:
        function: Returns a list of scores, one per image.
        columns: {prompt: {column: value}}: columns of its own, which take precedence over the file's.
    """

    range = (-float("inf"), float("inf"))
    licence = "your own"
    differentiable = False
    elsewhere = False
    takes_metadata = True

    def __init__(self, function: Callable[..., Any], *, columns: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.function, self.columns = function, dict(columns or {})
        self.name = name_of(function)
        self._names = sorted({name for values in self.columns.values() for name in values})
        parameters = inspect.signature(function).parameters.values()
        named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
        self._takes = {item.name for item in named}
        self._takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters)
        self._required = {item.name for item in named if item.default is item.empty} - {*GIVEN}
        unnamed = [item.name for item in parameters if item.kind is item.POSITIONAL_ONLY]
        wanted = {*GIVEN, *self._names} - self._takes
        if unnamed or (wanted and not self._takes_all):
            raise UserError(
                f"reward '{self.name}': it cannot be called by keyword with {', '.join([*GIVEN, *self._names])} "
                f"({', '.join(unnamed or sorted(wanted))}); as in TRL, write it as f(prompts, completions, **columns)"
            )

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]; `metadata`: the other columns of each prompt's row."""
        rows = [{}] * len(prompts) if metadata is None else metadata
        self.check_prompts(prompts, rows)
        names = dict.fromkeys(name for row in rows for name in row if self._is_taken(name))
        columns = {name: [row.get(name) for row in rows] for name in names if name not in self._names}
        columns |= {name: [self._value(prompt, name) for prompt in prompts] for name in self._names}
        returned = self.function(prompts=prompts, completions=pictures(images), **columns)
        return one_score_per_image(returned, prompts, reward=self.name, device=images.device).detach()

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """UserError if the function requires a column that none of the prompts has."""
        present = dict.fromkeys(name for row in metadata for name in row)
        for name in sorted(self._required - {*present, *self._names}):
            raise UserError(
                f"reward '{self.name}': it requires '{name}', but the prompts have no such column "
                f"(they have: {', '.join(present) or 'none'}); add the column to the file of prompts, or, in Python, "
                "give TRLReward(function, columns={prompt: {column: value}})"
            )

    def _is_taken(self, name: str) -> bool:
        return name not in GIVEN and (self._takes_all or name in self._takes)

    def _value(self, prompt: str, name: str) -> Any:
        try:
            return self.columns[prompt][name]
        except KeyError as error:
            raise UserError(f"reward '{self.name}': columns have no '{name}' for the prompt '{prompt}'") from error


def is_trl_style(function: Any) -> bool:
    """Whether this is a callable (not a class of rewards) with a parameter `completions`."""
    try:
        return not isinstance(function, type) and "completions" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
