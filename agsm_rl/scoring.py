"""Scoring images by rewards, checked: what a reward returns is used only if it is a finite number an image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Reward


def check_rewards(rewards: Sequence[tuple[Reward, float]]) -> list[tuple[Reward, float]]:
    """The (reward, weight) pairs as a list; UserError if there are none."""
    if not rewards:
        raise UserError("rewards: there are none; name at least one, as in `rewards: {shapes: 1.0}`")
    return list(rewards)


def checked_score(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """The reward's scores [B]; UserError naming the reward when they have another shape or are not finite."""
    try:
        score = reward(images, prompts)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward '{reward.name}': it failed with {type(error).__name__}: {error}") from error
    if not isinstance(score, Tensor) or score.shape != (len(prompts),):
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise UserError(
            f"reward '{reward.name}': it returned {got}, but a score an image is wanted: shape ({len(prompts)},)"
        )
    if not torch.isfinite(score).all():
        bad = int((~torch.isfinite(score)).nonzero()[0])
        raise UserError(f"reward '{reward.name}': its score is {float(score[bad])} for the prompt '{prompts[bad]}'")
    return score.float().to(images.device)


def weighted_scores(
    rewards: Sequence[tuple[Reward, float]], images: Tensor, prompts: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the rewards' scores, [B], and each reward's own scores [B] by its name."""
    total, scores = torch.zeros(len(prompts), device=images.device), {}
    for reward, weight in rewards:
        scores[reward.name] = checked_score(reward, images, prompts)
        total = total + weight * scores[reward.name]
    return total, scores
