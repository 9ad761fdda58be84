"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO with a ratio that is centred and of one scale at every denoising step.

With μ and μ_old a step's means under the live policy and the one that drew, and σ the standard deviation of its noise,
    log ρ = σ · ( log π − log π_old + ‖μ − μ_old‖² / (2σ²) ),   L = clipped loss of ρ / |Δt|  +  w·KL.
The added square cancels the negative mean of log π − log π_old, which lets the clip miss positive advantages; σ and
|Δt| even out the steps, of which plain ratios favour those with little noise. log π and squares are means over latents.
"""

from typing import Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Metrics, RolloutBatch
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.objectives.policy_gradient import (
    check_keeps_means,
    clipped_losses,
    log_probs_of,
    old_means_of,
    step_intervals,
)
from agsm_rl.policy import Policy, Source


def guarded_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mean_gap: Tensor, std: Tensor) -> Tensor:
    """σ · (log π − log π_old + mean (μ − μ_old)² / (2σ²)), [B, S].

    `mean_gap` [B, S] is mean (μ − μ_old)² and `std` [S] each step's σ, above 0. Gradient through `log_prob` and
    `mean_gap`. In expectation over the noise it is 0, and its spread is that of the means' distance at every step.
    """
    if not log_prob.shape == old_log_prob.shape == mean_gap.shape or std.shape != log_prob.shape[1:]:
        shapes = [tuple(one.shape) for one in (log_prob, old_log_prob, mean_gap, std)]
        raise ValueError(f"log_prob, old_log_prob, mean_gap and std: got the shapes {shapes}; expected [B, S] and [S]")
    return (log_prob - old_log_prob.detach() + mean_gap / (2 * std**2)) * std


class GRPOGuard(FlowGRPO):
    """GRPO-Guard on rollouts that keep their steps' means (`keep_means: true`).

    Args:
        clip_range: c > 0 of the clipped loss. Ratios are nearer to 1 than Flow-GRPO's, by the factor σ.
        reweight: Divide a step's loss by |Δt|, as released.
        kl_weight: w ≥ 0 of the KL divergence from the reference. 0 needs no prediction of it.
        kl: `exact` or `published`, as in `flow_grpo`.
        detach_unconditional: With guidance, gradients flow through the conditional branch alone.
        timestep_fraction: Share f of each image's steps in (0, 1] that is learned from.
    """

    def __init__(
        self,
        *,
        clip_range: float = 2e-6,
        reweight: bool = True,
        kl_weight: float = 0.0,
        kl: Literal["exact", "published"] = "exact",
        detach_unconditional: bool = False,
        timestep_fraction: float = 1.0,
        timesteps: Literal["first", "even"] = "first",
        images_per_pass: int | None = None,
        steps_per_pass: int = 1,
    ) -> None:
        super().__init__(
            clip_range=clip_range,
            kl_weight=kl_weight,
            kl=kl,
            detach_unconditional=detach_unconditional,
            timestep_fraction=timestep_fraction,
            timesteps=timesteps,
            images_per_pass=images_per_pass,
            steps_per_pass=steps_per_pass,
        )
        self.reweight = reweight

    def check_source(self, source: Source) -> None:
        """The rollouts must keep their steps' means, and their steps must be Gaussian."""
        _check_gaussian(source.noise)
        check_keeps_means(source)

    def loss(self, policy: Policy, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        """The loss over the batch's steps; UserError for steps whose log-probability is not a Gaussian's."""
        _check_gaussian(batch.noise)
        return super().loss(policy, batch)

    def policy_loss(
        self, policy: Policy, batch: RolloutBatch, live: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Metrics]:
        """The clipped loss of the guarded ratios."""
        gap = mean_gaps(live, old_means_of(batch))
        std = torch.stack([std for _, std in live]).to(gap)
        old = batch.log_probs[:, list(batch.steps)]
        log_ratio = guarded_log_ratio(log_probs_of(batch, live), old, gap, std)
        losses, metrics = clipped_losses(log_ratio, batch.advantages[:, None], clip_range=self.clip_range)
        if self.reweight:
            losses = losses / step_intervals(policy, batch).to(losses)
        return losses.mean(), metrics


def mean_gaps(live: list[tuple[Tensor, Tensor]], old: list[Tensor]) -> Tensor:
    """Mean (μ − μ_old)² of each image and step, [B, S]; gradient through the live means alone."""
    pairs = zip(live, old, strict=True)
    return torch.stack(
        [((mean.float() - before.detach().float()) ** 2).flatten(1).mean(1) for (mean, _), before in pairs], dim=1
    )


def _check_gaussian(noise: str | None) -> None:
    if noise == "cps":
        raise UserError(
            "the rollouts draw with `noise: cps`, whose published log-probability is not a Gaussian's, so nothing "
            "needs centring; use `flow_grpo` with it, or `noise: flow_sde`"
        )
