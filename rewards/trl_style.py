"""Reward functions as today's TRL calls them, `f(prompts=…, completions=…, **columns)` → a list of scores, as rewards.

A recipe names such a function as `module:function` in its `rewards` (with `--allow-import module`) and needs no
wrapper. From Python: `TRLReward(function)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from agsm_rl_rewards.attributes import name_of
from agsm_rl_rewards.preprocessing import pictures
from agsm_rl_rewards.returned_scores import one_score_per_image
from torch import Tensor

from agsm_rl.errors import UserError


class TRLReward:
    """Calls `function` by keyword with `prompts`, a list of texts, and `completions`, a list of PIL images.

    Raises UserError if the function requires further arguments, or for an image whose prompt has no columns.

    Args:
        function: Returns a list of scores, one per image.
        columns: {prompt: {column: value}}: what else the function takes; each column is passed as a list with one value
            per image.
    """

    range = (-float("inf"), float("inf"))
    licence = "your own"
    differentiable = False
    elsewhere = False
    takes_metadata = False

    def __init__(self, function: Callable[..., Any], *, columns: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.function, self.columns = function, dict(columns or {})
        self.name = name_of(function)
        self._names = sorted({name for values in self.columns.values() for name in values})
        arguments = dict.fromkeys(["prompts", "completions", *self._names])
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise UserError(
                f"reward '{self.name}': it cannot be called with {', '.join(arguments)} ({error}); give "
                "what it expects from a data set as TRLReward(function, columns={prompt: {column: value}})"
            ) from error

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        columns = {name: [self._value(prompt, name) for prompt in prompts] for name in self._names}
        returned = self.function(prompts=prompts, completions=pictures(images), **columns)
        return one_score_per_image(returned, prompts, reward=self.name, device=images.device).detach()

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
