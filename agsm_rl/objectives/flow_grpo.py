"""Flow-GRPO (arXiv 2505.05470): group-relative policy optimisation of the denoising steps, with a KL to the reference.

    L = mean over images and steps of  max( -A·ρ, -A·clip(ρ, 1 - c, 1 + c) ) + w·KL,
    ρ = exp(log π(x_{k+1} | x_k) - log π_old(x_{k+1} | x_k)),   KL = ‖μ - μ_ref‖² / (2σ²),
with π = N(μ, σ²) a step of the backbone's sampler: for a flow model its SDE with the flow's marginals, for SD1.5 and
SDXL a DDIM step. log π and the KL are means over latent elements. A, relative to the prompt's other images of the draw,
is computed by the rollouts: `advantages: group`.
"""

from typing import Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Metrics, RolloutBatch
from agsm_rl.objectives.policy_gradient import PolicyGradient, clipped_policy_loss, log_probs_of, step_intervals
from agsm_rl.policy import Policy


def step_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std²) ‖ N(reference_mean, std²)) averaged over the elements of each row, [B]; means [B, ...], std 0-d.

    Gradient through `mean` alone. A step without noise (std 0) has no density to compare: its KL counts as 0.
    """
    squared = ((mean.float() - reference_mean.detach().float()) ** 2).flatten(1).mean(1)
    return 0 * squared if std == 0 else squared / (2 * std.float() ** 2)


def flow_grpo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, kl: Tensor, *, clip_range: float, kl_weight: float
) -> tuple[Tensor, Metrics]:
    """The clipped policy loss plus `kl_weight` times the mean of `kl`; all of one shape, or broadcasting to it.

    Metrics: those of `clipped_policy_loss`, and `kl`, the mean.
    """
    loss, metrics = clipped_policy_loss(log_prob, old_log_prob, advantages, clip_range=clip_range)
    return with_kl(loss, metrics, kl, kl_weight=kl_weight)


def with_kl(loss: Tensor, metrics: Metrics, kl: Tensor, *, kl_weight: float) -> tuple[Tensor, Metrics]:
    """The loss plus `kl_weight` times the mean of `kl`, and the metric `kl`, that mean."""
    return loss + kl_weight * kl.mean(), metrics | {"kl": kl.detach().mean()}


class FlowGRPO(PolicyGradient):
    """Flow-GRPO on rollouts of any backbone.

    Published for SD3.5 (the authors' configurations): rollouts of 10 steps, 24 images per prompt, and the values below.

    Args:
        clip_range: c > 0 of PPO's clipped loss: a step is not followed further once its ratio leaves 1 ± c. Published:
            1e-4, and 1e-5 without guidance.
        kl_weight: w ≥ 0 of the KL divergence from the reference. 0 needs no prediction of it. Published: 0.04
            for GenEval and text rendering, 0.01 for PickScore.
        kl: `exact`: the divergence of the step's Gaussians. `published`: as the authors' code computes it for its SDE,
            with σ_t² in place of the step's variance σ_t²·|Δt|: |Δt| times the exact one, so that the published weights
            mean what they meant. Their cps has no |Δt|: there the two are the same.
        detach_unconditional: With guidance, gradients flow through the conditional branch alone. Published: true.
        timestep_fraction: Share f of each image's steps in (0, 1] that is learned from. Published: 0.99, all but the
            last of 10.
    """

    def __init__(
        self,
        *,
        clip_range: float = 1e-4,
        kl_weight: float = 0.04,
        kl: Literal["exact", "published"] = "exact",
        detach_unconditional: bool = False,
        timestep_fraction: float = 1.0,
        timesteps: Literal["first", "even"] = "first",
        images_per_pass: int | None = None,
        steps_per_pass: int = 1,
    ) -> None:
        super().__init__(
            clip_range=clip_range,
            timestep_fraction=timestep_fraction,
            timesteps=timesteps,
            images_per_pass=images_per_pass,
            steps_per_pass=steps_per_pass,
        )
        if kl_weight < 0:
            raise UserError(f"kl_weight: got {kl_weight}, but it must be 0 or more (published: 0.04)")
        if kl not in ("exact", "published"):
            raise unknown_name("kl", kl, "a form of the KL", ("exact", "published"))
        self.kl_weight, self.kl, self.detach_unconditional = kl_weight, kl, detach_unconditional

    def loss(self, policy: Policy, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        """The loss over the batch's steps; with `kl_weight: 0` there is no metric `kl`."""
        live = self.live_steps(policy, batch)
        loss, metrics = self.policy_loss(policy, batch, live)
        if not self.kl_weight:
            return loss, metrics
        reference = self.steps_under(policy, policy.reference, batch)
        pairs = zip(live, reference, strict=True)
        kl = torch.stack([step_kl(mean, base, std) for (mean, std), (base, _) in pairs], dim=1)
        if self.kl == "published":
            kl = kl * self._intervals(policy, batch).to(kl)
        return with_kl(loss, metrics, kl, kl_weight=self.kl_weight)

    def policy_loss(
        self, policy: Policy, batch: RolloutBatch, live: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Metrics]:
        """The loss without the KL, of the batch's steps with their distributions under the live policy."""
        log_prob, old = log_probs_of(batch, live), batch.log_probs[:, list(batch.steps)]
        return clipped_policy_loss(log_prob, old, batch.advantages[:, None], clip_range=self.clip_range)

    def _intervals(self, policy: Policy, batch: RolloutBatch) -> Tensor:
        """|Δt| of the batch's steps, [S]; UserError for steps that the authors' code does not have."""
        if batch.noise == "ddim":
            raise UserError(
                "kl: published, but the rollouts draw with `noise: ddim`, which the authors' code does not have; use "
                "`kl: exact`, or rollouts of a flow model with `noise: flow_sde`"
            )
        if batch.noise == "cps":
            return torch.ones(len(batch.steps))
        return step_intervals(policy, batch)
