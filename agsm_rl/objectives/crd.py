"""CRD, centred reward distillation (arXiv 2603.14128): the policy's implicit reward is regressed on the true one.

For the images of a prompt under one noise and noise level, with rewards r in [0, 1] and matching errors ℓ and ℓ_old,
    L = mean of  (β·(ρ − ρ̄) − (r − r̄))²,   ρ = ℓ_old − ℓ.
Centring within the prompt cancels the unknown normaliser of the optimal policy, so that ρ and r can be compared at all.
A KL to the reference, which may be guided and may grow with the reward, holds the policy in place.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from agsm_rl.errors import unknown_name
from agsm_rl.interfaces import Metrics, RewardedBatch
from agsm_rl.objectives.forward_process import (
    ForwardProcess,
    check_above_zero,
    check_weights,
    groups_of,
    matching_error,
    optimality,
    reference_prediction,
    sums_by_group,
)
from agsm_rl.policy import Noised, Policy
from agsm_rl.training.old_policy import OldPolicy

LEAST_KL = 1e-4
"""Weight of the KL of an image of reward 0 where the weight grows with the reward."""


def crd_loss(
    implicit: Tensor,
    reward: Tensor,
    group: Tensor,
    *,
    beta: float = 1.0,
    temperature: float | None = None,
    form: Literal["mse", "bce"] = "mse",
) -> tuple[Tensor, Metrics]:
    """The loss of implicit rewards ρ, rewards r in [0, 1] and groups (0, 1, …), each [B]; gradient through `implicit`.

    `beta` > 0 scales ρ. `temperature`: None centres on the group's mean; a number above 0 centres once on the mean
    weighted by softmax(r / temperature) and once on that weighted by softmax(−r / temperature), and averages the two.
    `form`: `mse` as above, or `bce`, the cross entropy of σ(β·(ρ − ρ̄)) with σ(r − r̄). Means are not differentiated.

    Metrics: `implicit`, mean ρ; `optimality`, mean r; `agreement`, the correlation of the centred ρ and r, 0 where one
    of them is constant.
    """
    if not implicit.shape == reward.shape == group.shape:
        shapes = [tuple(one.shape) for one in (implicit, reward, group)]
        raise ValueError(f"implicit, reward and group: got the shapes {shapes}; expected [B] each")
    reward = reward.detach().to(implicit)
    signs = (0.0,) if temperature is None else (1 / temperature, -1 / temperature)
    losses = []
    for sign in signs:
        heat = sign * reward
        weights = torch.exp(heat - _largest(heat, group))
        rho = implicit - _weighted_mean(implicit.detach(), weights, group)
        r = reward - _weighted_mean(reward, weights, group)
        if form == "bce":
            losses.append(binary_cross_entropy_with_logits(beta * rho, torch.sigmoid(r)))
        else:
            losses.append(((beta * rho - r) ** 2).mean())
    even = torch.ones_like(reward)
    rho = implicit.detach() - _weighted_mean(implicit.detach(), even, group)
    r = reward - _weighted_mean(reward, even, group)
    norm = rho.norm() * r.norm()
    agreement = torch.where(norm > 0, (rho * r).sum() / norm.clamp(min=1e-30), torch.zeros_like(norm))
    return torch.stack(losses).mean(), {
        "implicit": implicit.detach().mean(),
        "optimality": reward.mean(),
        "agreement": agreement,
    }


def _weighted_mean(values: Tensor, weights: Tensor, group: Tensor) -> Tensor:
    """The weighted mean of its group, for each of `values` [B]."""
    means = sums_by_group(values * weights, group) / sums_by_group(weights, group)
    return means[group.to(means.device)]


def _largest(values: Tensor, group: Tensor) -> Tensor:
    """The largest value of its group, for each of `values` [B]: one of a softmax's weights is then 1, however sharp."""
    group = group.to(values.device)
    lowest = values.new_full((int(group.max()) + 1,), -torch.inf)
    return lowest.scatter_reduce(0, group, values, "amax")[group]


class CRD(ForwardProcess):
    """Centred reward distillation on rewarded images; rollouts need two images per prompt or more.

    Advantages become r = ½ + ½·clip(advantage / `advantage_scale`, −1, 1). The authors keep two snapshots: `old` in the
    loss, and another that draws; here the latter is the EMA (`drawn_by: ema`), or one does both (`drawn_by: old`).

    Args:
        beta: β, above 0: how far the implicit reward is taken to reach. Published: 1.
        advantage_scale: Above 0; the advantage at which r reaches 0 or 1. Published: 5.
        temperature: Null centres on a prompt's mean; a number above 0 on its best and on its worst images in turn, the
            sharper the smaller it is.
        form: `mse` or `bce`.
        adaptive: Divide each image's squared error by its own mean absolute error, in ℓ and ℓ_old.
        reference: What ℓ_old is of: the `old` policy, or the `base` (the recipe's `reference`).
        scaled: Multiply the loss by `advantage_scale` / β.
        kl_weight: Weight of the mean squared distance from the reference's prediction. Published: 0.1.
        kl_guidance: Guidance scale of the reference's prediction there. Published: 4.5. 1 is none and costs half.
        kl_adaptive: The weight grows with an image's r, from 1e-4 at 0 to `kl_weight` at 1.
        old: How the old policy follows the trained parameters, {decay, every}, as in `diffusion_nft`. Null: it is the
            run's EMA.
        sampler_steps: Take the noise levels from the sampler's schedule of so many steps within the term's `t`. Null:
            uniform.
        levels_per_image: Noise levels per image and step, each with new noise; of a sampler's, all different.
        rows_per_pass: Images that go through the denoiser at once, whole prompts only; null is all. Fewer need less
            memory and give the same gradient.
    """

    compares_images: ClassVar[bool] = True

    def __init__(
        self,
        *,
        beta: float = 1.0,
        advantage_scale: float = 5.0,
        temperature: float | None = None,
        form: Literal["mse", "bce"] = "mse",
        adaptive: bool = True,
        reference: Literal["base", "old"] = "old",
        scaled: bool = True,
        kl_weight: float = 0.1,
        kl_guidance: float = 4.5,
        kl_adaptive: bool = True,
        old: OldPolicy | None = None,
        sampler_steps: int | None = None,
        levels_per_image: int = 1,
        rows_per_pass: int | None = None,
    ) -> None:
        super().__init__(
            old=old, sampler_steps=sampler_steps, levels_per_image=levels_per_image, rows_per_pass=rows_per_pass
        )
        check_above_zero(beta=beta, advantage_scale=advantage_scale, temperature=temperature)
        check_weights(kl_weight=kl_weight)
        if form not in ("mse", "bce"):
            raise unknown_name("form", form, "a form of the loss", ("mse", "bce"))
        if reference not in ("base", "old"):
            raise unknown_name("reference", reference, "a reference", ("base", "old"))
        self.beta, self.advantage_scale, self.temperature, self.form = beta, advantage_scale, temperature, form
        self.adaptive, self.reference, self.scaled = adaptive, reference, scaled
        self.kl_weight, self.kl_guidance, self.kl_adaptive = kl_weight, kl_guidance, kl_adaptive

    def loss_of(self, policy: Policy, batch: RewardedBatch, seen: Noised) -> tuple[Tensor, Metrics]:
        """The loss of a batch of whole prompts, each with one noise and one noise level."""
        x_t, t, target, cond = seen
        old = policy.old(x_t, t, cond) if self.reference == "old" else policy.reference(x_t, t, cond)
        live = policy.live(x_t, t, cond)
        implicit = matching_error(old, target, adaptive=self.adaptive) - matching_error(
            live, target, adaptive=self.adaptive
        )
        reward = optimality(batch.advantages, self.advantage_scale)
        group = groups_of(batch)
        loss, metrics = crd_loss(implicit, reward, group, beta=self.beta, temperature=self.temperature, form=self.form)
        if self.scaled:
            loss = loss * (self.advantage_scale / self.beta)
        if self.kl_weight:
            gap = matching_error(live, reference_prediction(policy, seen, guidance=self.kl_guidance))
            weight = torch.full_like(gap, self.kl_weight)
            if self.kl_adaptive:
                weight = LEAST_KL + reward.to(gap) * (self.kl_weight - LEAST_KL)
            loss, metrics = loss + (weight * gap).mean(), metrics | {"reference_gap": gap.detach().mean()}
        return loss, metrics
