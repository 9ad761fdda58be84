"""How much better an image is than others of its prompt: than they usually are, or than those of the same draw.

If all compared rewards are equal, the advantage is exactly 0: a division must not blow up rounding errors.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

Histories = dict[str, deque[float]]
"""Each prompt's newest rewards."""


@dataclass(frozen=True)
class AdvantageForm:
    """What rollouts' `advantages` mean."""

    by: Literal["history", "group"]
    """What a reward is compared with."""
    std: Literal["group", "global"]
    """Whose standard deviation it is divided by."""
    transform: Literal["exponential"] | None = None
    """What is made of the normalised reward."""

    def finished(self, advantages: Tensor, clip: float) -> Tensor:
        """Normalised rewards [N] transformed and clipped to ± `clip`."""
        worth = 1 - torch.exp(-advantages) if self.transform == "exponential" else advantages
        return worth.clamp(-clip, clip)


def check_advantages(
    given: str | Mapping[str, str], *, images_per_prompt: int, history: int, min_history: int
) -> AdvantageForm:
    """What rollouts' `advantages` mean; UserError if nothing."""
    options = {"by": given} if isinstance(given, str) else dict(given)
    for name in options:
        if name not in ("by", "std", "transform"):
            raise unknown_name("advantages", name, "one of its options", ("by", "std", "transform"))
    by, std, transform = options.get("by", "group"), options.get("std", "group"), options.get("transform")
    if transform not in (None, "exponential"):
        raise unknown_name("advantages.transform", transform, "a transform of advantages", ("exponential",))
    if by not in ("history", "group"):
        raise unknown_name("advantages", by, "a way to normalise rewards", ("history", "group"))
    if by == "history" and history < min_history:
        raise UserError(
            f"history: got {history}, but min_history is {min_history}: a prompt would never have enough "
            f"rewards; give {min_history} or more, or a smaller min_history"
        )
    if by == "group" and images_per_prompt < 2:
        raise UserError(
            "images_per_prompt: got 1, but `advantages: group` compares a prompt's images with each other; give 2 "
            "or more, or `advantages: history`"
        )
    if by == "history" and "std" in options:
        raise UserError("advantages.std: it belongs to `by: group`, but `by` is history; leave std out")
    if std not in ("group", "global"):
        raise unknown_name("advantages.std", std, "a standard deviation", ("group", "global"))
    return AdvantageForm(
        "group" if by == "group" else "history",
        "global" if std == "global" else "group",
        None if transform is None else "exponential",
    )


def normalised_by_prompt(
    rewards: Tensor, prompts: list[str], histories: Histories, *, history: int, min_history: int
) -> Tensor:
    """(reward − mean) / (standard deviation + 1e-6), [N], by the newest `history` rewards of the image's own prompt.

    DDPO's (arXiv 2305.13301, section 5.2).
    `histories` is extended by these rewards first. While a prompt has fewer than `min_history`, the mean and the
    standard deviation are those of all N `rewards`.
    """
    everything = _center_and_spread(rewards)
    for reward, prompt in zip(rewards.tolist(), prompts, strict=True):
        histories.setdefault(prompt, deque(maxlen=history)).append(reward)
    advantages = torch.empty_like(rewards)
    for index, prompt in enumerate(prompts):
        past = torch.tensor(list(histories[prompt]), dtype=rewards.dtype)
        center, spread = _center_and_spread(past) if len(past) >= min_history else everything
        advantages[index] = (rewards[index] - center) / (spread + 1e-6)
    return advantages


def normalised_by_group(rewards: Tensor, prompts: list[str], *, std: Literal["group", "global"] = "group") -> Tensor:
    """(reward − mean of its prompt) / (standard deviation + 1e-4), [N], over the images of the same prompt among these.

    GRPO's group-relative advantage (arXiv 2402.03300), as Flow-GRPO uses it (arXiv 2505.05470; 1e-4 is its code's).
    `std`: the standard deviation of the prompt's own images, or of all N rewards, as in Flow-GRPO's configurations for
    SD3.5: a prompt whose images hardly differ then counts little. A group of equal rewards teaches nothing: 0.
    """
    if std not in ("group", "global"):
        raise ValueError(f"std: '{std}' is neither 'group' nor 'global'")
    _, overall = _center_and_spread(rewards)
    advantages = torch.empty_like(rewards)
    for prompt in dict.fromkeys(prompts):
        group = [index for index, other in enumerate(prompts) if other == prompt]
        center, spread = _center_and_spread(rewards[group])
        advantages[group] = (rewards[group] - center) / ((spread if std == "group" else overall) + 1e-4)
    return advantages


def normalised_over_all(rewards: Tensor) -> Tensor:
    """(reward − mean) / (standard deviation + 1e-4), [N], over all of them.

    For a sum of rewards that were normalised one by one: GDPO's last step (arXiv 2601.05242), which keeps the size of
    the advantages the same whatever the number of rewards.
    """
    center, spread = _center_and_spread(rewards)
    return (rewards - center) / (spread + 1e-4)


def _center_and_spread(rewards: Tensor) -> tuple[float, float]:
    if bool((rewards == rewards[0]).all()):
        return float(rewards[0]), 0.0
    return float(rewards.mean()), float(rewards.std(correction=0))
