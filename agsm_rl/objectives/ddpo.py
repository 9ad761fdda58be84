"""DDPO, denoising diffusion policy optimisation (arXiv 2305.13301): steps are actions, images are rewarded.

    L = mean over images and steps of  max( -A·ρ, -A·clip(ρ, 1 - c, 1 + c) ),
    ρ = exp(log π(x_{k+1} | x_k) - log π_old(x_{k+1} | x_k)),
with π the Gaussian DDIM step with η = 1, log π averaged over latent elements, and A the clipped, normalised reward.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Metrics, RolloutBatch
from agsm_rl.policy import Policy
from agsm_rl.sampling import gaussian_log_prob, guided


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float = 1e-4
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss (arXiv 1707.06347, eq. 7), as DDPO uses it.

    All of one shape, or broadcasting to it; gradient through `log_prob` alone. `clip_range` > 0; it is tiny
    (published: 1e-4) because log-probabilities are means over latent elements.

    Metrics: `ratio` (mean), `ratio_deviation` (mean |ρ - 1|), `clip_fraction`, `approximate_kl` = mean ½(log ρ)².
    """
    old_log_prob, advantages = old_log_prob.detach(), advantages.detach()
    difference = log_prob - old_log_prob
    ratio = difference.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(unclipped, clipped).mean()
    off = (ratio.detach() - 1).abs()
    return loss, {
        "ratio": ratio.detach().mean(),
        "ratio_deviation": off.mean(),
        "clip_fraction": (off > clip_range).float().mean(),
        "approximate_kl": 0.5 * (difference.detach() ** 2).mean(),
    }


class DDPO:
    """DDPO on rollouts. Guidance is applied in training as it was in sampling (the rollouts say how much).

    `clip_range` 1e-4 is published. `timestep_fraction` in (0, 1] learns from that share of each image's steps, evenly
    spaced (published: 1). `images_per_pass` bounds memory: fewer images at once, the same gradient.
    """

    consumes: ClassVar[type[Batch]] = RolloutBatch

    def __init__(
        self, *, clip_range: float = 1e-4, timestep_fraction: float = 1.0, images_per_pass: int | None = None
    ) -> None:
        if clip_range <= 0:
            raise UserError(f"clip_range: got {clip_range}, but it must be above 0 (published: 1e-4)")
        if not 0 < timestep_fraction <= 1:
            raise UserError(f"timestep_fraction: got {timestep_fraction}, but it must lie in (0, 1]")
        if images_per_pass is not None and images_per_pass < 1:
            raise UserError(f"images_per_pass: got {images_per_pass}, but it must be 1 or more")
        self.clip_range = clip_range
        self.timestep_fraction = timestep_fraction
        self.images_per_pass = images_per_pass

    def check(self, batch_size: int) -> None:
        """Any number of rollouts will do."""

    def split(self, batch: RolloutBatch) -> list[tuple[RolloutBatch, float]]:
        """A part a denoising step and `images_per_pass` images, so that no more activations are held at a time."""
        count = max(1, round(self.timestep_fraction * len(batch.steps)))
        chosen = torch.linspace(0, len(batch.steps) - 1, count).round().long().tolist()
        rows = torch.split(torch.arange(len(batch)), self.images_per_pass or len(batch))
        parts = [batch.select(index) for index in rows] if len(rows) > 1 else [batch]
        return [
            (replace(part, steps=(batch.steps[k],)), len(part) / len(batch) / count) for part in parts for k in chosen
        ]

    def loss(self, policy: Policy, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        """The clipped loss over the batch's steps."""
        log_prob = torch.stack([step_log_prob(policy, batch, k) for k in batch.steps], dim=1)
        old = batch.log_probs[:, list(batch.steps)]
        return clipped_policy_loss(log_prob, old, batch.advantages[:, None], clip_range=self.clip_range)


def step_log_prob(policy: Policy, batch: RolloutBatch, k: int) -> Tensor:
    """log π of the rollouts' step k under the live policy, [B]."""
    backbone = policy.backbone
    sampler = backbone.sampler(batch.num_steps)
    cond, uncond = backbone.encode_text(batch.prompts), backbone.encode_text([batch.negative_prompt])
    x_t, x_next = batch.trajectory[:, k], batch.trajectory[:, k + 1]
    t = sampler.t[k].to(x_t.device).expand(len(batch))
    prediction = guided(policy.live, x_t, t, cond, uncond, batch.guidance)
    mean, std = sampler.transition(k, x_t, prediction, eta=batch.eta)
    return gaussian_log_prob(x_next, mean, std)
