"""SPO, step-aware preference optimisation (arXiv 2406.04314): of the ways that a denoising step could go, prefer one.

With ρ = exp(log π(x_{k+1} | x_k) - log π_ref(x_{k+1} | x_k)) of the better (w) and the worse (l) candidate of a step,
    L = mean of  -log σ( β·[log clip(ρ_w, 1 - c, 1 + c) - log clip(ρ_l, 1 - c, 1 + c)] ),
where π is the Gaussian step, log π averaged over latent elements, and the reference is by default the base. The
candidates share the state x_k, so that a pair differs in what this one step did, not in its layout.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Cond, Metrics, StepPreferenceBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Objective, Policy
from agsm_rl.training.precision import at_least_float32
from agsm_rl.training.sampling import Predict, guided, log_density, transition
from agsm_rl.training.sizes import sampler_for


def spo_loss(
    chosen_log_prob: Tensor,
    rejected_log_prob: Tensor,
    reference_chosen_log_prob: Tensor,
    reference_rejected_log_prob: Tensor,
    *,
    beta: float = 10.0,
    clip_range: float = 0.1,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """SPO's loss over pairs of steps.

    All are log-probabilities averaged over latent elements, [B]; the reference's get no gradient. `beta` > 0: how
    strongly the policy is held to the reference is its inverse. `clip_range` in (0, 1): a candidate whose ratio is
    outside 1 ± c is not followed further. `weight` [B], ≥ 0, multiplies the pairs' losses before the mean (None: 1).

    Metrics, weighted alike: `accuracy`, the share of pairs on whose chosen candidate the policy gained more on the
    reference (ties count half: 0.5 at the start); `margin`, the argument of σ; `chosen_ratio` and `rejected_ratio`,
    ρ before clipping; `clip_fraction`, the share of candidates whose ρ is clipped.
    """
    chosen = at_least_float32(chosen_log_prob) - at_least_float32(reference_chosen_log_prob.detach())
    rejected = at_least_float32(rejected_log_prob) - at_least_float32(reference_rejected_log_prob.detach())
    share = torch.ones_like(chosen) if weight is None else weight.to(chosen)
    low, high = math.log(1 - clip_range), math.log(1 + clip_range)
    margin = beta * (chosen.clamp(low, high) - rejected.clamp(low, high))
    both = torch.stack([chosen.detach(), rejected.detach()])
    clipped = ((both < low) | (both > high)).float().mean(dim=0)
    figures = {
        "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
        "margin": margin.detach(),
        "chosen_ratio": both[0].exp(),
        "rejected_ratio": both[1].exp(),
        "clip_fraction": clipped,
    }
    return -(share * logsigmoid(margin)).mean(), {name: (share * value).mean() for name, value in figures.items()}


class SPO(Objective):
    """SPO over step preferences. Guidance is applied in training as it was in sampling.

    Args:
        beta: β > 0. The larger it is, the more closely the policy is held to the reference. Published: 10.
        clip_range: c in (0, 1): a candidate whose ratio to the reference leaves 1 ± c is not followed further.
            Published: 0.1.
        rows_per_pass: Pairs that go through the denoiser at once; null is all. Fewer need less memory and give the
            same gradient.
    """

    consumes: ClassVar[type[Batch]] = StepPreferenceBatch
    draws_t: ClassVar[bool] = False

    def __init__(self, *, beta: float = 10.0, clip_range: float = 0.1, rows_per_pass: int | None = None) -> None:
        if beta <= 0:
            raise UserError(f"beta: got {beta}, but it must be above 0 (published: 10)")
        if not 0 < clip_range < 1:
            raise UserError(f"clip_range: got {clip_range}, but it must lie in (0, 1) (published: 0.1)")
        check_at_least_one("rows_per_pass", rows_per_pass)
        self.beta, self.clip_range, self.rows_per_pass = beta, clip_range, rows_per_pass

    def split(self, batch: StepPreferenceBatch) -> list[tuple[StepPreferenceBatch, float]]:
        """Parts of `rows_per_pass` pairs; all at once by default."""
        return in_passes(batch, self.rows_per_pass)

    def loss(self, policy: Policy, batch: StepPreferenceBatch) -> tuple[Tensor, Metrics]:
        """The preference loss of the batch's pairs."""
        cond, uncond = batch.encode_text(policy.backbone), policy.backbone.encode_negative(batch.negative_prompt)
        live = pair_log_probs(policy, policy.live, batch, cond, uncond)
        reference = pair_log_probs(policy, policy.reference, batch, cond, uncond)
        return spo_loss(*live, *reference, beta=self.beta, clip_range=self.clip_range, weight=batch.weight)


def pair_log_probs(
    policy: Policy, predict: Predict, batch: StepPreferenceBatch, cond: Cond, uncond: Cond
) -> tuple[Tensor, Tensor]:
    """log π of the chosen and of the rejected steps, [B] each, under `policy.live` or another prediction.

    The authors predict twice where the two candidates begin at one state; here once.
    """
    sampler, device = sampler_for(policy.backbone, batch.num_steps, batch.chosen), batch.chosen.device
    begins = [batch.chosen_from] if batch.same_start else [batch.chosen_from, batch.rejected_from]
    t = sampler.t.cpu()[batch.step].to(device).repeat(len(begins))
    predictions = guided(predict, torch.cat(begins), t, Cond.cat([cond] * len(begins)), uncond, batch.guidance)
    by_start = predictions.chunk(len(begins))
    rows = [(batch.step == k).nonzero().flatten() for k in batch.step.unique().tolist()]
    back = torch.cat(rows).argsort().to(device)

    def log_probs(start: Tensor, end: Tensor, prediction: Tensor) -> Tensor:
        found = []
        for part in rows:
            k, part = int(batch.step[part[0]]), part.to(device)
            mean, std = transition(sampler, k, start[part], prediction[part], eta=batch.eta, noise=batch.noise)
            found.append(log_density(end[part], mean, std, noise=batch.noise))
        return torch.cat(found)[back]

    chosen = log_probs(batch.chosen_from, batch.chosen, by_start[0])
    return chosen, log_probs(batch.rejected_from, batch.rejected, by_start[-1])
