"""What DDPO and Flow-GRPO share: denoising steps are actions, drawn from Gaussians whose means are learned.

PPO's clipped loss on log-probabilities, the distribution of a rollout's step under any of a policy's predictions, and
the split of a batch by steps. Nothing here asks which backbone's sampler made the steps.
"""

from dataclasses import replace

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Metrics, RolloutBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Policy
from agsm_rl.sampling import Predict, gaussian_log_prob, step_distribution


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


def check_options(*, clip_range: float, timestep_fraction: float, images_per_pass: int | None) -> None:
    """UserError at the first option that cannot be."""
    if clip_range <= 0:
        raise UserError(f"clip_range: got {clip_range}, but it must be above 0 (published: 1e-4)")
    if not 0 < timestep_fraction <= 1:
        raise UserError(f"timestep_fraction: got {timestep_fraction}, but it must lie in (0, 1]")
    check_at_least_one("images_per_pass", images_per_pass)


def by_steps(
    batch: RolloutBatch, *, timestep_fraction: float, images_per_pass: int | None
) -> list[tuple[RolloutBatch, float]]:
    """A part a denoising step and `images_per_pass` images, so that no more activations are held at a time.

    Of the steps, the share `timestep_fraction`, evenly spaced.
    """
    count = max(1, round(timestep_fraction * len(batch.steps)))
    chosen = torch.linspace(0, len(batch.steps) - 1, count).round().long().tolist()
    return [
        (replace(part, steps=(batch.steps[k],)), share / count)
        for part, share in in_passes(batch, images_per_pass)
        for k in chosen
    ]


def rollout_step(policy: Policy, predict: Predict, batch: RolloutBatch, k: int) -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and standard deviation (0-d) of the rollouts' step k under `policy.live` or another prediction.

    Guidance is applied as it was in sampling.
    """
    backbone = policy.backbone
    return step_distribution(
        predict,
        backbone.sampler(batch.num_steps),
        k,
        batch.trajectory[:, k],
        backbone.encode_text(batch.prompts),
        backbone.encode_text([batch.negative_prompt]),
        guidance=batch.guidance,
        eta=batch.eta,
    )


def step_log_prob(policy: Policy, batch: RolloutBatch, k: int) -> Tensor:
    """log π of the rollouts' step k under the live policy, [B]."""
    return gaussian_log_prob(batch.trajectory[:, k + 1], *rollout_step(policy, policy.live, batch, k))
