"""Flow-DPPO (arXiv 2606.11025): Flow-GRPO whose trust region is a divergence, not a clipped ratio.

A step's Gaussians under the live policy and the one that drew share their noise σ, so that their divergence is exact:
    D = ‖μ − μ_old‖² / (2σ²),   L = mean over images and steps of  −m·A·ρ  +  w·KL,
with m = 0 where D has reached `threshold` and the step still leads away from the old policy (ρ above 1 for an advantage
above 0, below 1 for one below), else 1. Squares are means over latent elements.
"""

from typing import Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Metrics, RolloutBatch
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.objectives.grpo_guard import mean_gaps
from agsm_rl.objectives.policy_gradient import check_keeps_means, log_probs_of, old_means_of
from agsm_rl.policy import Policy, Source


def masked_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, divergence: Tensor, *, threshold: float
) -> tuple[Tensor, Metrics]:
    """The loss over log π, log π_old and D [B, S] and advantages [B, 1]; gradient through `log_prob` alone.

    Metrics: `ratio`, `ratio_deviation` and `approximate_kl` as in `clipped_policy_loss`; `clip_fraction`, the share of
    steps that are masked; `divergence`, mean D.
    """
    if not log_prob.shape == old_log_prob.shape == divergence.shape:
        shapes = [tuple(one.shape) for one in (log_prob, old_log_prob, divergence)]
        raise ValueError(f"log_prob, old_log_prob and divergence: got the shapes {shapes}; expected [B, S] each")
    difference = log_prob - old_log_prob.detach()
    ratio, advantages = difference.detach().exp(), advantages.detach()
    away = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
    masked = (divergence.detach() >= threshold) & away
    # Masked before the exponential, which may have overflowed there, and inf · 0 is no number.
    followed = torch.where(masked, torch.zeros_like(difference), difference).exp()
    loss = torch.where(masked, torch.zeros_like(followed), -advantages * followed).mean()
    return loss, {
        "ratio": ratio.mean(),
        "ratio_deviation": (ratio - 1).abs().mean(),
        "clip_fraction": masked.float().mean(),
        "approximate_kl": 0.5 * (difference.detach() ** 2).mean(),
        "divergence": divergence.detach().mean(),
    }


class FlowDPPO(FlowGRPO):
    """Flow-DPPO on rollouts that keep their steps' means (`keep_means: true`).

    Args:
        threshold: Divergence per latent element, above 0, from which on steps that lead away are not followed. UniRL
            and verl-omni: 1e-5; Flow-Factory: 1e-6.
        kl_weight: w ≥ 0 of the KL divergence from the reference. Published: 0, which needs no prediction of it.
        kl: `exact` or `published`, as in `flow_grpo`.
        detach_unconditional: With guidance, gradients flow through the conditional branch alone.
        timestep_fraction: Share f of each image's steps in (0, 1] that is learned from.
    """

    def __init__(
        self,
        *,
        threshold: float = 1e-5,
        kl_weight: float = 0.0,
        kl: Literal["exact", "published"] = "exact",
        detach_unconditional: bool = False,
        timestep_fraction: float = 1.0,
        timesteps: Literal["first", "even"] = "first",
        images_per_pass: int | None = None,
        steps_per_pass: int = 1,
    ) -> None:
        super().__init__(
            kl_weight=kl_weight,
            kl=kl,
            detach_unconditional=detach_unconditional,
            timestep_fraction=timestep_fraction,
            timesteps=timesteps,
            images_per_pass=images_per_pass,
            steps_per_pass=steps_per_pass,
        )
        if threshold <= 0:
            raise UserError(f"threshold: got {threshold}, but it must be above 0 (published: 1e-5)")
        self.threshold = threshold

    def check_source(self, source: Source) -> None:
        """The rollouts must keep their steps' means."""
        check_keeps_means(source)

    def policy_loss(
        self, policy: Policy, batch: RolloutBatch, live: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Metrics]:
        """The loss with the mask in place of the clip."""
        gap = mean_gaps(live, old_means_of(batch)).detach()
        std = torch.stack([std for _, std in live]).to(gap)
        old = batch.log_probs[:, list(batch.steps)]
        log_prob = log_probs_of(batch, live)
        return masked_policy_loss(
            log_prob, old, batch.advantages[:, None], gap / (2 * std**2), threshold=self.threshold
        )
