"""Any Python callable as a reward: `f(images, prompts)`, `f(images, prompts, metadata)`, or TRL's form (trl_style.py).

A recipe names a function as `module:function` in its `rewards`, with `--allow-import module` on the command line; in
Python, functions, `functools.partial`, objects with `__call__` and torch modules are given as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from agsm_rl_rewards.attributes import attribute, name_of
from agsm_rl_rewards.returned_scores import one_score_per_image
from agsm_rl_rewards.trl_style import TRLReward, is_trl_style
from torch import Tensor, nn

from agsm_rl.errors import UserError

Role = Literal["images", "prompts", "metadata"]
ROLES: dict[Role, set[str]] = {
    "images": {"images", "image", "imgs", "img", "pixels", "pixel_values"},
    "prompts": {"prompts", "prompt", "texts", "text", "captions", "caption"},
    "metadata": {"metadata", "metadatas", "meta"},
}
"""What a function may call the three things it gets."""
SHAPES = (
    "a reward function takes (images, prompts), (images, prompts, metadata), or (prompts, completions, **columns) as "
    "in TRL; any further parameter needs a default"
)


class FunctionReward:
    """Calls a function of images [B, 3, H, W] in [0, 1], B prompts and, if it takes them, B dicts of metadata.

    The function returns one score per image: a tensor, array or list of shape [B] or [B, 1], or (scores, info) as in
    ddpo-pytorch. Optional attributes of the function: `name`; `differentiable = True` if gradients reach the pixels;
    `range = (low, high)`; `licence`; `elsewhere = True` if it waits for another process. A torch module is put in
    evaluation mode and follows the images' device.

    Raises UserError if the function cannot be called that way, or returns anything else.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = name_of(function)
        self._arguments = _arguments(function, self.name)
        self.function = function.eval() if isinstance(function, nn.Module) else function
        self.differentiable = bool(attribute(function, "differentiable", False))
        self.range: tuple[float, float] = attribute(function, "range", (-float("inf"), float("inf")))
        self.licence: str = attribute(function, "licence", "your own")
        self.elsewhere = bool(attribute(function, "elsewhere", False))
        self.takes_metadata = "metadata" in [role for _, role in self._arguments]

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [B]; `metadata`, one mapping per image, holds the other columns of the prompts' file."""
        values = {
            "images": images,
            "prompts": prompts,
            "metadata": [dict(row) for row in metadata or [{}] * len(prompts)],
        }
        if isinstance(self.function, nn.Module):
            self.function.to(images.device)
        by_position = [values[role] for name, role in self._arguments if name is None]
        by_name = {name: values[role] for name, role in self._arguments if name is not None}
        returned = self.function(*by_position, **by_name)
        return one_score_per_image(returned, prompts, reward=self.name, device=images.device)


def as_reward(thing: Any) -> Any:
    """The reward of anything callable: a reward itself as it is, a function wrapped in the form that it has."""
    if isinstance(thing, type):
        raise UserError(f"reward '{thing.__name__}': this is a class; give an instance of it, {thing.__name__}(…)")
    if not callable(thing):
        raise UserError(f"reward {thing!r:.80}: it cannot be called; {SHAPES}")
    if _is_reward(thing):
        return thing
    return TRLReward(thing) if is_trl_style(thing) else FunctionReward(thing)


def reward_maker(thing: Any) -> Any:
    """What makes the reward that a recipe names: a class itself, else a function without options."""
    if isinstance(thing, type):
        return thing

    def make() -> Any:
        return as_reward(thing)

    make.__name__ = name_of(thing)
    return make


def _is_reward(thing: Any) -> bool:
    """Whether this is a reward already: an object with a name that can be called as `thing(images, prompts)`."""
    if inspect.isroutine(thing) or isinstance(thing, functools.partial | nn.Module) or not hasattr(thing, "name"):
        return False
    try:
        inspect.signature(thing).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def _arguments(function: Callable[..., Any], name: str) -> list[tuple[str | None, Role]]:
    """What the function is called with: (its parameter, or None for the next position, and what goes there)."""
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        signature = inspect.signature(called)
    except (TypeError, ValueError) as error:
        raise UserError(f"reward '{name}': Python cannot tell which arguments it takes; {SHAPES}") from error
    parameters = list(signature.parameters.values())
    roles = _roles(parameters)
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in roles
    ]
    arguments: list[tuple[str | None, Role]] = [
        (None if parameter.kind is parameter.POSITIONAL_ONLY else parameter.name, roles[parameter.name])
        for parameter in parameters
        if parameter.name in roles
    ]
    if not roles and not missing:
        kinds = {parameter.kind for parameter in parameters}
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            arguments = [(None, "images"), (None, "prompts")]
        elif inspect.Parameter.VAR_KEYWORD in kinds:
            arguments = [("images", "images"), ("prompts", "prompts")]
    takes_images = "images" in [role for _, role in arguments]
    if missing or not takes_images or inspect.iscoroutinefunction(called):
        kind = "it is asynchronous" if inspect.iscoroutinefunction(called) else f"it takes {signature}"
        raise UserError(f"reward '{name}': {kind:.200}, but {SHAPES}")
    return arguments


def _roles(parameters: list[inspect.Parameter]) -> dict[str, Role]:
    """Which parameter gets what: by its name, else by its position among those without a default."""
    named = [item for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    roles: dict[str, Role] = {}
    for parameter in named:
        for role, names in ROLES.items():
            if parameter.name.lower() in names and role not in roles.values():
                roles[parameter.name] = role
    left = [role for role in ROLES if role not in roles.values()]
    for parameter in named:
        if parameter.name in roles or parameter.default is not parameter.empty or not left:
            continue
        # A third parameter gets the metadata only if its name says so, or says nothing.
        fits = left[0] != "metadata" or len(parameter.name.strip("_")) <= 1
        if fits and parameter.kind is not parameter.KEYWORD_ONLY:
            roles[parameter.name] = left.pop(0)
    return roles
