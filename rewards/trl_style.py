"""Reward functions as today's TRL calls them, `f(prompts=…, completions=…, **columns)` → a list of scores, as rewards.

A recipe names such a function as `module:function` among its `rewards` (with `--allow-import module`); it is wrapped by
itself. From Python: `TRLReward(function)`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError


class TRLReward:
    """Calls `function` by keyword with `prompts`, a list of texts, and `completions`, a list of PIL images.

    `columns`: {prompt: {column: value}}, what the function takes besides; each column comes as a list with a value an
    image. UserError when the function wants arguments that it would not get, or an image of an unknown prompt.
    """

    range = (-float("inf"), float("inf"))
    licence = "your own"
    differentiable = False

    def __init__(self, function: Callable[..., Any], *, columns: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.function, self.columns = function, dict(columns or {})
        self.name = getattr(function, "__name__", type(function).__name__)
        self._names = sorted({name for values in self.columns.values() for name in values})
        given = dict.fromkeys(["prompts", "completions", *self._names])
        try:
            inspect.signature(function).bind(**given)
        except TypeError as error:
            raise UserError(
                f"reward '{self.name}': it cannot be called with {', '.join(given)} ({error}); what a data set's "
                "columns would hold is given as TRLReward(function, columns={prompt: {column: value}})"
            ) from error

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        columns = {name: [self._value(prompt, name) for prompt in prompts] for name in self._names}
        scores = self.function(prompts=prompts, completions=pictures(images), **columns)
        if not isinstance(scores, list | tuple | Tensor):
            raise UserError(
                f"reward '{self.name}': it returned {type(scores).__name__}, but a list of scores is wanted"
            )
        if not isinstance(scores, Tensor):
            if None in scores:
                where = prompts[list(scores).index(None)]
                raise UserError(f"reward '{self.name}': it gave no score (None) for the prompt '{where}'")
            scores = torch.tensor([float(score) for score in scores])
        return scores.detach().float().to(images.device)

    def _value(self, prompt: str, name: str) -> Any:
        try:
            return self.columns[prompt][name]
        except KeyError as error:
            raise UserError(f"reward '{self.name}': columns have no '{name}' for the prompt '{prompt}'") from error


def pictures(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [0, 1] as PIL images of 8 bits a channel."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def is_trl_style(found: Any) -> bool:
    """Whether this is a function (not a class of rewards) that takes `completions`."""
    return not inspect.isclass(found) and callable(found) and "completions" in inspect.signature(found).parameters


def maker(function: Callable[..., Any]) -> Callable[[], TRLReward]:
    """What makes the function's reward when a recipe names it; it takes no options."""

    def make() -> TRLReward:
        return TRLReward(function)

    make.__name__ = getattr(function, "__name__", "reward")
    return make
