"""Scoring unfinished images: by rewards that judge states, and by any other reward through the estimated image."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

from torch import Tensor

from agsm_rl.training.scoring import Rows, WeightedReward, checked_call, checked_score
from agsm_rl.training.stages import stage


class States:
    """States on the way to images, as rewards see them.

    Args:
        x_t: The noisy latents [B, C, h, w], scaled as the denoiser has them.
        x0: The model's estimates of the finished images' latents, of the same shape; `x_t` itself where it is finished.
        t: Noise levels [B] in [0, 1): 1,000·t, rounded down, is a diffusion timestep. 0 is a finished image.
        decode: From latents to images.
    """

    def __init__(self, x_t: Tensor, x0: Tensor, t: Tensor, decode: Callable[[Tensor], Tensor]) -> None:
        self.x_t, self.x0, self.t, self._decode = x_t, x0, t, decode

    @cached_property
    def images(self) -> Tensor:
        """The estimates `x0` as images [B, 3, H, W] in [0, 1], decoded when they are first asked for."""
        return self._decode(self.x0)


@runtime_checkable
class StepAware(Protocol):
    """A reward that judges unfinished images knowing how noisy they are; any other reward judges the estimated image.

    It is a reward all the same, and is called as one where finished images are scored.
    """

    def score_states(self, states: States, prompts: list[str]) -> Tensor:
        """Scores of B states for B prompts, float [B]; more is better, and only a prompt's scores are compared."""
        ...


def scores_of_states(
    rewards: Sequence[WeightedReward], states: States, prompts: list[str], metadata: Rows | None = None
) -> dict[str, Tensor]:
    """Each reward's scores [B] by its name in the run; UserError as in `checked_score`."""
    scores = {}
    for item in rewards:
        with stage(f"scoring {len(prompts)} states with {item.name}"):
            scores[item.name] = _score(item, states, prompts, metadata)
    return scores


def _score(item: WeightedReward, states: States, prompts: list[str], metadata: Rows | None) -> Tensor:
    reward = item.reward
    if isinstance(reward, StepAware):
        judge: StepAware = reward
        return checked_call(lambda: judge.score_states(states, list(prompts)), states.x_t, prompts, name=item.name)
    return checked_score(reward, states.images, prompts, name=item.name, metadata=metadata)
