"""Any Python function as a reward: `f(images, prompts)` → scores, or TRL's form (trl_style.py).

A recipe names it as `module:function` among its `rewards`, with `--allow-import module` on the command line.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from agsm_rl_rewards import trl_style
from torch import Tensor

from agsm_rl.errors import UserError


class FunctionReward:
    """Calls `function(images [B, 3, H, W] in [0, 1], prompts)`; it gives a score an image, as a tensor or a list.

    Its name is the function's. `function.differentiable = True` tells that gradients reach the pixels, and
    `function.range = (low, high)` and `function.licence` what they say; none is needed.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.range = getattr(function, "range", (-float("inf"), float("inf")))
        self.licence = getattr(function, "licence", "your own")

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        scores = self.function(images, prompts)
        if isinstance(scores, Tensor):
            return scores
        try:
            return torch.tensor([float(score) for score in scores], device=images.device)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward '{self.name}': a score an image is wanted, but it returned {scores!r}") from error


def is_plain(found: Any) -> bool:
    """Whether this is a function (not a class of rewards) whose two arguments are `images` and `prompts`."""
    if inspect.isclass(found) or not callable(found):
        return False
    return list(inspect.signature(found).parameters) == ["images", "prompts"]


def as_reward(function: Any) -> Any:
    """The reward of a function that is given in Python, in either form."""
    return trl_style.TRLReward(function) if trl_style.is_trl_style(function) else FunctionReward(function)


def reward_maker(found: Any) -> Any:
    """What makes the reward that a recipe names: a class of rewards itself; for a function, what wraps it."""
    if trl_style.is_trl_style(found):
        return trl_style.maker(found)
    if not is_plain(found):
        return found

    def make() -> FunctionReward:
        return FunctionReward(found)

    make.__name__ = getattr(found, "__name__", "reward")
    return make
