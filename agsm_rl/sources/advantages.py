"""How much better an image is than its prompt's images: than they usually are, or than those drawn beside it."""

from collections import deque

import torch
from torch import Tensor


def normalised_by_prompt(
    rewards: Tensor, prompts: list[str], histories: dict[str, deque[float]], *, history: int, min_history: int
) -> Tensor:
    """(reward − mean) / (standard deviation + 1e-6), [N], by the newest `history` rewards of the image's own prompt.

    DDPO's (arXiv 2305.13301, section 5.2).
    `histories` is extended by these rewards first. While a prompt has fewer than `min_history`, the mean and the
    standard deviation are those of all N `rewards`.
    """
    mean, std = float(rewards.mean()), float(rewards.std(correction=0))
    for reward, prompt in zip(rewards.tolist(), prompts, strict=True):
        histories.setdefault(prompt, deque(maxlen=history)).append(reward)
    advantages = torch.empty_like(rewards)
    for index, prompt in enumerate(prompts):
        past = torch.tensor(list(histories[prompt]))
        known = len(past) >= min_history
        center, spread = (float(past.mean()), float(past.std(correction=0))) if known else (mean, std)
        advantages[index] = (rewards[index] - center) / (spread + 1e-6)
    return advantages


def normalised_by_group(rewards: Tensor, prompts: list[str]) -> Tensor:
    """(reward − mean) / (standard deviation + 1e-4), [N], over the images of the same prompt among these.

    GRPO's group-relative advantage (arXiv 2402.03300), as Flow-GRPO uses it (arXiv 2505.05470; 1e-4 is its code's).
    A group whose rewards are all equal teaches nothing: 0.
    """
    advantages = torch.empty_like(rewards)
    for prompt in dict.fromkeys(prompts):
        group = [index for index, other in enumerate(prompts) if other == prompt]
        own = rewards[group]
        advantages[group] = (own - own.mean()) / (own.std(correction=0) + 1e-4)
    return advantages
