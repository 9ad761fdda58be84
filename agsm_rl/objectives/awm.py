"""AWM, advantage weighted matching (arXiv 2509.25050): the policy gradient with the pretraining loss as likelihood.

For an image of advantage A under one noise and noise level, with the matching error ℓ of its prediction,
    log π = −w(ℓ, t),   ratio = exp(log π − log π_old),   L = mean of  max(−A·ratio, −A·clip(ratio, 1 ± clip_range)).
A good image lowers its matching error, a bad one raises it; no sampling path is kept. Two KLs, mean squared distances
of predictions, hold the policy to the reference and to its EMA.
"""

from typing import Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Metrics, RewardedBatch
from agsm_rl.objectives.forward_process import (
    ForwardProcess,
    check_above_zero,
    check_weights,
    matching_error,
    reference_prediction,
)
from agsm_rl.policy import Noised, Policy
from agsm_rl.training.old_policy import OldPolicy

Weighting = Literal["uniform", "t", "t_squared", "ghuber"]
WEIGHTINGS = ("uniform", "t", "t_squared", "ghuber")
SMALLEST_ERROR = 1e-10
"""Added to an error before it is raised to a power below 1, whose slope at 0 is infinite."""


def awm_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float
) -> tuple[Tensor, Metrics]:
    """The clipped loss over log π, log π_old and advantages, each [B]; gradient through `log_prob` alone.

    `clip_range` is above 0 (published: 1).

    Metrics: `ratio`, its mean; `ratio_deviation`, mean |ratio − 1|; `clip_fraction`, the share of images whose ratio
    lies outside of 1 ± `clip_range`.
    """
    if not log_prob.shape == old_log_prob.shape == advantages.shape:
        shapes = [tuple(one.shape) for one in (log_prob, old_log_prob, advantages)]
        raise ValueError(f"log_prob, old_log_prob and advantages: got the shapes {shapes}; expected [B] each")
    ratio = torch.exp(log_prob - old_log_prob.detach())
    advantages = advantages.detach().to(ratio)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    deviation = (ratio.detach() - 1).abs()
    return loss, {
        "ratio": ratio.detach().mean(),
        "ratio_deviation": deviation.mean(),
        "clip_fraction": (deviation > clip_range).float().mean(),
    }


def matching_log_prob(error: Tensor, t: Tensor, *, weighting: Weighting = "ghuber", power: float = 0.25) -> Tensor:
    """log π = −w(ℓ, t), [B], of matching errors ℓ [B] at noise levels t [B] in [0, 1].

    w is ℓ (`uniform`), t·ℓ (`t`), t²·ℓ (`t_squared`), or t·((ℓ + ε)^p − ε^p)/p with p = `power` in (0, 1] (`ghuber`,
    the released generalised Huber loss, ε = 1e-10; its `huber` is half of this with p = ½).
    """
    t = t.to(error)
    if weighting == "ghuber":
        huber: Tensor = ((error + SMALLEST_ERROR) ** power - SMALLEST_ERROR**power) / power
        return -t * huber
    return -error * {"uniform": torch.ones_like(t), "t": t, "t_squared": t**2}[weighting]


class AWM(ForwardProcess):
    """Advantage weighted matching on rewarded images; any sampler works: with `eta: 0`, rollouts keep no path.

    Args:
        clip_range: The ratio is clipped to 1 ± this, above 0. Published: 1.
        advantage_scale: Advantages are clipped to ± this and divided by it. Published: 5.
        weighting: How the matching error becomes a likelihood: `uniform`, `t`, `t_squared` or `ghuber`. Released:
            `ghuber`; the paper's text: `uniform`.
        huber_power: Power of `ghuber`, in (0, 1]. Released: 0.25.
        kl_weight: Weight of the mean squared distance from the reference's prediction. Released: 0.003 (GenEval, OCR),
            1e-4 (PickScore). 0 saves its forward pass.
        ema_kl_weight: Weight of the mean squared distance from the prediction of the run's EMA. Released: 1. 0 saves
            its forward pass.
        old: The policy that the ratio compares with, {decay, every}, as in `diffusion_nft`; {decay: 0.0, every: draw}
            is the one that drew the images, if `drawn_by` is live. Null: the live policy itself, so that the ratio is 1
            and no forward pass is needed; exact with `updates: 1`, as released.
        sampler_steps: Take the noise levels from the sampler's schedule of so many steps (released: 14) within the
            term's `t`. Null: uniform.
        levels_per_image: Noise levels per image and step, each with new noise; of a sampler's, all different.
            Released: 6.
        rows_per_pass: Images that go through the denoiser at once; null is all. Fewer need less memory and give the
            same gradient.
    """

    def __init__(
        self,
        *,
        clip_range: float = 1.0,
        advantage_scale: float = 5.0,
        weighting: Weighting = "ghuber",
        huber_power: float = 0.25,
        kl_weight: float = 0.003,
        ema_kl_weight: float = 1.0,
        old: OldPolicy | None = None,
        sampler_steps: int | None = None,
        levels_per_image: int = 1,
        rows_per_pass: int | None = None,
    ) -> None:
        super().__init__(
            old=old, sampler_steps=sampler_steps, levels_per_image=levels_per_image, rows_per_pass=rows_per_pass
        )
        check_above_zero(clip_range=clip_range, advantage_scale=advantage_scale)
        check_weights(kl_weight=kl_weight, ema_kl_weight=ema_kl_weight)
        if weighting not in WEIGHTINGS:
            raise unknown_name("weighting", weighting, "a weighting", WEIGHTINGS)
        if not 0 < huber_power <= 1:
            raise UserError(f"huber_power: got {huber_power}, but it must lie in (0, 1]")
        self.clip_range, self.advantage_scale = clip_range, advantage_scale
        self.weighting, self.huber_power = weighting, huber_power
        self.kl_weight, self.ema_kl_weight = kl_weight, ema_kl_weight

    def loss_of(self, policy: Policy, batch: RewardedBatch, seen: Noised) -> tuple[Tensor, Metrics]:
        """The loss of the images, and the distances that hold the policy."""
        x_t, t, target, cond = seen
        before = None if self.old is None else self._log_prob(policy.old(x_t, t, cond), target, t)
        live = policy.live(x_t, t, cond)
        log_prob = self._log_prob(live, target, t)
        advantages = batch.advantages.clamp(-self.advantage_scale, self.advantage_scale) / self.advantage_scale
        old = log_prob.detach() if before is None else before
        loss, metrics = awm_loss(log_prob, old, advantages, clip_range=self.clip_range)
        if self.kl_weight:
            gap = matching_error(live, reference_prediction(policy, seen)).mean()
            loss, metrics = loss + self.kl_weight * gap, metrics | {"reference_gap": gap.detach()}
        if self.ema_kl_weight:
            gap = matching_error(live, policy.ema(x_t, t, cond)).mean()
            loss, metrics = loss + self.ema_kl_weight * gap, metrics | {"ema_gap": gap.detach()}
        return loss, metrics

    def _log_prob(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        error = matching_error(prediction, target)
        return matching_log_prob(error, t, weighting=self.weighting, power=self.huber_power)
