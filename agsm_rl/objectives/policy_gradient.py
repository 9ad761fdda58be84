"""What DDPO and Flow-GRPO share: denoising steps are actions, drawn from Gaussians whose means are learned.

PPO's clipped loss on log-probabilities, the distribution of a rollout's steps under any of a policy's predictions, and
the split of a batch by steps. Nothing here asks which backbone's sampler made the steps.
"""

from dataclasses import replace

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Cond, Metrics, RolloutBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Policy
from agsm_rl.sampling import Predict, gaussian_log_prob, step_distributions


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


def check_options(
    *, clip_range: float, timestep_fraction: float, images_per_pass: int | None, steps_per_pass: int
) -> None:
    """UserError at the first option that cannot be."""
    if clip_range <= 0:
        raise UserError(f"clip_range: got {clip_range}, but it must be above 0 (published: 1e-4)")
    if not 0 < timestep_fraction <= 1:
        raise UserError(f"timestep_fraction: got {timestep_fraction}, but it must lie in (0, 1]")
    check_at_least_one("images_per_pass", images_per_pass)
    check_at_least_one("steps_per_pass", steps_per_pass)


def by_steps(
    batch: RolloutBatch, *, timestep_fraction: float, images_per_pass: int | None, steps_per_pass: int
) -> list[tuple[RolloutBatch, float]]:
    """A part `steps_per_pass` denoising steps of `images_per_pass` images: so many activations are held at a time.

    Of the steps, the share `timestep_fraction`, evenly spaced. Where the rollouts kept their graph, the activations of
    all images are held already, and a backward pass frees those of all images: they are not cut.
    """
    if batch.graph is not None and batch.graph.holds(batch.steps):
        images_per_pass = None
    count = max(1, round(timestep_fraction * len(batch.steps)))
    places = torch.linspace(0, len(batch.steps) - 1, count).round().long()
    chosen = [tuple(batch.steps[place] for place in some.tolist()) for some in places.split(steps_per_pass)]
    return [
        (replace(part, steps=steps), share * len(steps) / count)
        for part, share in in_passes(batch, images_per_pass)
        for steps in chosen
    ]


class PassText:
    """The text of the images of a pass, encoded for its first steps and kept for the others; of one pass at a time."""

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._found: tuple[Cond, Cond] | None = None

    def __call__(self, backbone: Backbone, batch: RolloutBatch) -> tuple[Cond, Cond]:
        """The prompts [B rows] and the negative prompt [1 row]."""
        # Parts of the same images share these objects, so that what is kept is never of another batch.
        of = (backbone, batch.prompts, batch.cond, batch.negative_prompt)
        if self._found is None or any(one is not other for one, other in zip(of, self._of, strict=True)):
            self._found = batch.encode_text(backbone), backbone.encode_text([batch.negative_prompt])
            self._of = of
        return self._found


def rollout_steps(
    policy: Policy, predict: Predict, batch: RolloutBatch, text: PassText | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Of each of the batch's steps, mean [B, C, h, w] and standard deviation (0-d) under `policy.live` or another.

    Guidance is applied as it was in sampling.
    """
    backbone = policy.backbone
    return step_distributions(
        predict,
        backbone.sampler(batch.num_steps),
        batch.steps,
        batch.trajectory[:, list(batch.steps)],
        *(text or PassText())(backbone, batch),
        guidance=batch.guidance,
        eta=batch.eta,
    )


def live_steps(policy: Policy, batch: RolloutBatch, text: PassText) -> list[tuple[Tensor, Tensor]]:
    """`rollout_steps` under `policy.live`: those that the draw came to, where it kept their graph."""
    kept = None if batch.graph is None else batch.graph.take(batch.steps, batch.rows)
    return rollout_steps(policy, policy.live, batch, text) if kept is None else kept


def log_probs_of(batch: RolloutBatch, distributions: list[tuple[Tensor, Tensor]]) -> Tensor:
    """log π of what the batch's steps came to, [B, S], under the distributions of these steps."""
    found = [
        gaussian_log_prob(batch.trajectory[:, k + 1], mean, std)
        for k, (mean, std) in zip(batch.steps, distributions, strict=True)
    ]
    return torch.stack(found, dim=1)


def step_log_prob(policy: Policy, batch: RolloutBatch, k: int) -> Tensor:
    """log π of the rollouts' step k under the live policy, [B]."""
    one = replace(batch, steps=(k,))
    return log_probs_of(one, rollout_steps(policy, policy.live, one))[:, 0]
