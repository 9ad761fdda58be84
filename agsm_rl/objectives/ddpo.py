"""DDPO, denoising diffusion policy optimisation (arXiv 2305.13301): steps are actions, images are rewarded.

    L = mean over images and steps of  max( -A·ρ, -A·clip(ρ, 1 - c, 1 + c) ),
    ρ = exp(log π(x_{k+1} | x_k) - log π_old(x_{k+1} | x_k)),
with π the Gaussian DDIM step with η = 1, log π averaged over latent elements, and A the clipped, normalised reward.
"""

from typing import ClassVar

from torch import Tensor

from agsm_rl.interfaces import Batch, Metrics, RolloutBatch
from agsm_rl.objectives.policy_gradient import (
    PassText,
    by_steps,
    check_options,
    clipped_policy_loss,
    live_steps,
    log_probs_of,
    step_log_prob,
)
from agsm_rl.policy import Policy

__all__ = ["DDPO", "clipped_policy_loss", "step_log_prob"]


class DDPO:
    """DDPO on rollouts. Guidance is applied in training as it was in sampling (the rollouts say how much).

    `clip_range` 1e-4 is published. `timestep_fraction` in (0, 1] learns from that share of each image's steps, evenly
    spaced (published: 1). `images_per_pass` bounds memory: fewer images at once, the same gradient. `steps_per_pass`
    steps of each go through the denoiser at once: the same gradient, for a GPU that few images leave idle.
    """

    consumes: ClassVar[type[Batch]] = RolloutBatch

    def __init__(
        self,
        *,
        clip_range: float = 1e-4,
        timestep_fraction: float = 1.0,
        images_per_pass: int | None = None,
        steps_per_pass: int = 1,
    ) -> None:
        check_options(
            clip_range=clip_range,
            timestep_fraction=timestep_fraction,
            images_per_pass=images_per_pass,
            steps_per_pass=steps_per_pass,
        )
        self.clip_range = clip_range
        self.timestep_fraction, self.images_per_pass = timestep_fraction, images_per_pass
        self.steps_per_pass = steps_per_pass
        self._text = PassText()

    def check(self, batch_size: int) -> None:
        """Any number of rollouts will do."""

    def split(self, batch: RolloutBatch) -> list[tuple[RolloutBatch, float]]:
        """A part `steps_per_pass` denoising steps of `images_per_pass` images."""
        return by_steps(
            batch,
            timestep_fraction=self.timestep_fraction,
            images_per_pass=self.images_per_pass,
            steps_per_pass=self.steps_per_pass,
        )

    def loss(self, policy: Policy, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        """The clipped loss over the batch's steps."""
        log_prob = log_probs_of(batch, live_steps(policy, batch, self._text))
        old = batch.log_probs[:, list(batch.steps)]
        return clipped_policy_loss(log_prob, old, batch.advantages[:, None], clip_range=self.clip_range)
