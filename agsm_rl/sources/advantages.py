"""How much better an image is than its prompt's images usually are (DDPO, arXiv 2305.13301, section 5.2)."""

from collections import deque

import torch
from torch import Tensor


def normalised_by_prompt(
    rewards: Tensor, prompts: list[str], histories: dict[str, deque[float]], *, history: int, min_history: int
) -> Tensor:
    """(reward − mean) / (standard deviation + 1e-6), [N], by the newest `history` rewards of the image's own prompt.

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
