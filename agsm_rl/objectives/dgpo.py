"""DGPO, direct group preference optimisation (arXiv 2510.08425): Diffusion-DPO between the halves of a group.

For the G images of a prompt with advantages A, under one noise and noise level, and their matching errors ℓ and ℓ_ref,
    L = −log σ( β/G · Σ A·(ℓ_ref − ℓ) ) / β.
Images above their group's mean are preferred to those below it, each as far as its advantage says. No sampling path is
kept, so that a deterministic sampler may draw the images.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from agsm_rl.errors import unknown_name
from agsm_rl.interfaces import Metrics, RewardedBatch
from agsm_rl.objectives.forward_process import (
    ForwardProcess,
    check_above_zero,
    check_weights,
    groups_of,
    matching_error,
    reference_prediction,
    sums_by_group,
)
from agsm_rl.policy import Noised, Policy
from agsm_rl.training.old_policy import OldPolicy


def dgpo_loss(
    error: Tensor, reference_error: Tensor, advantages: Tensor, group: Tensor, *, beta: float = 100.0
) -> tuple[Tensor, Metrics]:
    """The loss, averaged over images, of errors and advantages [B] and groups [B] (0, 1, …); gradient through `error`.

    `beta` > 0 sharpens the sigmoid (released: 100). The gradient is the released code's: σ(−s)·A·∇ℓ, averaged over
    images, with s the sigmoid's argument. A group counts by its size, however a batch is split.

    Metrics: `accuracy`, the share of images in groups with s > 0; `margin`, mean s / β; `error_change`, mean ℓ − ℓ_ref.
    """
    if not error.shape == reference_error.shape == advantages.shape == group.shape:
        shapes = [tuple(one.shape) for one in (error, reference_error, advantages, group)]
        raise ValueError(f"error, reference_error, advantages and group: got the shapes {shapes}; expected [B] each")
    reference_error, advantages = reference_error.detach(), advantages.detach().to(error)
    sizes = sums_by_group(torch.ones_like(error), group)
    margin = sums_by_group(advantages * (reference_error - error), group) / sizes
    share = sizes / len(error)
    return -(share * logsigmoid(beta * margin)).sum() / beta, {
        "accuracy": (share * (margin.detach() > 0)).sum(),
        "margin": (share * margin.detach()).sum(),
        "error_change": (error.detach() - reference_error).mean(),
    }


class DGPO(ForwardProcess):
    """Direct group preference optimisation on rewarded images; rollouts need two images per prompt or more.

    The images that a draw has of a prompt are one group: with `updates`, each update has its share of every group.

    Args:
        beta: β, above 0. Released: 100.
        clip_range: An image stops learning where exp(ℓ_old − ℓ), the ratio to the old policy, has gone more than this
            beyond 1 in its advantage's direction. Released: 0.01. Null: no clipping, which saves a forward pass.
        reference: What ℓ_ref is of: the `base` (the recipe's `reference`), as released, or the `old` policy.
        advantage_clip: Advantages are clipped to ± this, above 0. Released: 5.
        kl_weight: Weight of the mean squared distance from the reference's prediction. Released: 0.02.
        kl_guidance: Guidance scale of the reference's prediction, in that distance and in ℓ_ref; 1 is none.
        old: How the old policy follows the trained parameters, {decay, every}, as in `diffusion_nft`; with `drawn_by:
            old` it draws too. Released: {decay: {0: 0.0, 300: 0.3}, every: 1}. Null: it is the run's EMA.
        sampler_steps: Take the noise levels from the sampler's schedule of so many steps (released: 10) within the
            term's `t`. Null: uniform.
        levels_per_image: Noise levels per image and step, each with new noise; of a sampler's, all different.
        rows_per_pass: Images that go through the denoiser at once, whole groups only; null is all. Fewer need less
            memory and give the same gradient.
    """

    compares_images: ClassVar[bool] = True

    def __init__(
        self,
        *,
        beta: float = 100.0,
        clip_range: float | None = 0.01,
        reference: Literal["base", "old"] = "base",
        advantage_clip: float = 5.0,
        kl_weight: float = 0.02,
        kl_guidance: float = 1.0,
        old: OldPolicy | None = None,
        sampler_steps: int | None = None,
        levels_per_image: int = 1,
        rows_per_pass: int | None = None,
    ) -> None:
        super().__init__(
            old=old, sampler_steps=sampler_steps, levels_per_image=levels_per_image, rows_per_pass=rows_per_pass
        )
        check_above_zero(beta=beta, clip_range=clip_range, advantage_clip=advantage_clip)
        check_weights(kl_weight=kl_weight)
        if reference not in ("base", "old"):
            raise unknown_name("reference", reference, "a reference", ("base", "old"))
        self.beta, self.clip_range, self.reference, self.advantage_clip = beta, clip_range, reference, advantage_clip
        self.kl_weight, self.kl_guidance = kl_weight, kl_guidance

    def loss_of(self, policy: Policy, batch: RewardedBatch, seen: Noised) -> tuple[Tensor, Metrics]:
        """The loss of a batch of whole groups, each with one noise and one noise level."""
        x_t, t, target, cond = seen
        needs_base = self.reference == "base" or self.kl_weight > 0
        base = reference_prediction(policy, seen, guidance=self.kl_guidance) if needs_base else None
        needs_old = self.reference == "old" or self.clip_range is not None
        old_error = matching_error(policy.old(x_t, t, cond), target) if needs_old else None
        live = policy.live(x_t, t, cond)
        error = matching_error(live, target)
        advantages = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        metrics: Metrics = {}
        if self.clip_range is not None and old_error is not None:
            error, share = _stopped(error, old_error, advantages, clip_range=self.clip_range)
            metrics["clip_fraction"] = share
        reference_error = old_error if self.reference == "old" or base is None else matching_error(base, target)
        assert reference_error is not None
        loss, more = dgpo_loss(error, reference_error, advantages, groups_of(batch), beta=self.beta)
        if self.kl_weight and base is not None:
            gap = matching_error(live, base).mean()
            loss, metrics = loss + self.kl_weight * gap, metrics | {"reference_gap": gap.detach()}
        return loss, metrics | more


def _stopped(error: Tensor, old_error: Tensor, advantages: Tensor, *, clip_range: float) -> tuple[Tensor, Tensor]:
    """Errors [B], without gradient where the policy has gone far enough from the old one, and the share of those."""
    ratio = torch.exp(old_error - error.detach())
    gone = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return torch.where(gone, error.detach(), error), gone.float().mean()
