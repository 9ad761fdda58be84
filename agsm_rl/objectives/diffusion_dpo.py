"""Diffusion-DPO, direct preference optimisation for diffusion models (arXiv 2311.12908): prefer one of two images.

With m = mean (p(x_t, t, prompt) - v)² of the chosen (w) and the rejected (l) image, at the same noise and level t,
    L = mean of  -log σ( -(β/2)·[(m_w - m_w^ref) - (m_l - m_l^ref)] ),
where the reference is by default the base model, all adapters off.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Cond, Metrics, PairBatch, PreferenceBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Noised, Objective, Policy
from agsm_rl.training.precision import at_least_float32


def diffusion_dpo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    reference_chosen_error: Tensor,
    reference_rejected_error: Tensor,
    *,
    beta: float = 2000.0,
) -> tuple[Tensor, Metrics]:
    """Diffusion-DPO's loss over pairs of images.

    All are squared errors averaged over (C, H, W), [B]; the reference's get no gradient. `beta` > 0: how strongly the
    policy is held to the reference is its inverse (published: 2000 to 5000).

    Metrics: `accuracy`, the share of pairs on whose chosen image the policy gained more on the reference (ties count
    half: 0.5 at the start); `margin`, the argument of σ; `chosen_change` and `rejected_change`, the policy's error
    minus the reference's: the loss also falls when both rise, the rejected one faster.
    """
    chosen = at_least_float32(chosen_error) - at_least_float32(reference_chosen_error.detach())
    rejected = at_least_float32(rejected_error) - at_least_float32(reference_rejected_error.detach())
    margin = -beta / 2 * (chosen - rejected)
    return -logsigmoid(margin).mean(), {
        "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "margin": margin.detach().mean(),
        "chosen_change": chosen.detach().mean(),
        "rejected_change": rejected.detach().mean(),
    }


class DiffusionDPO(Objective):
    """Diffusion-DPO over preferences: those of a data set, or of own images through the view `best_against_worst`.

    Args:
        beta: β > 0. The larger it is, the more closely the policy is held to the reference. Published: 2000 to 5000.
        rows_per_pass: Pairs of images that go through the denoiser at once; null is all. Fewer need less memory and
            give the same gradient.
    """

    consumes: ClassVar[type[Batch]] = PreferenceBatch

    def __init__(self, *, beta: float = 2000.0, rows_per_pass: int | None = None) -> None:
        if beta <= 0:
            raise UserError(f"beta: got {beta}, but it must be above 0 (published: 2000 to 5000)")
        check_at_least_one("rows_per_pass", rows_per_pass)
        self.beta = beta
        self.rows_per_pass = rows_per_pass

    def split(self, batch: PreferenceBatch) -> list[tuple[PreferenceBatch, float]]:
        """Parts of `rows_per_pass` preferences; all at once by default."""
        return in_passes(batch, self.rows_per_pass)

    def noised(self, policy: Policy, images: PairBatch) -> Noised:
        """The images at their noise levels, all chosen ones before all rejected ones; a pair's have the same `rows`.

        Here both images of a pair get the same random noise; InPO inverts them instead.
        """
        return policy.noised(images)

    def loss(self, policy: Policy, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
        """The preference loss of the batch; both images of a pair are compared at the same noise level."""
        cond = batch.encode_text(policy.backbone)
        both = PairBatch(
            prompts=batch.prompts * 2,
            rows=batch.rows.repeat(2),
            latents=torch.cat([batch.chosen, batch.rejected]),
            cond=Cond.cat([cond, cond]),
            crops=_of_both(batch.chosen_crops, batch.rejected_crops),
        )
        x_t, t, target, cond = self.noised(policy, both)

        def errors(prediction: Tensor) -> tuple[Tensor, ...]:
            """Of the chosen and of the rejected images, [B] each."""
            return ((prediction.float() - target.float()) ** 2).mean(dim=(1, 2, 3)).chunk(2)

        reference = errors(policy.reference(x_t, t, cond))
        return diffusion_dpo_loss(*errors(policy.live(x_t, t, cond)), *reference, beta=self.beta)


def _of_both(chosen: Tensor | None, rejected: Tensor | None) -> Tensor | None:
    return None if chosen is None or rejected is None else torch.cat([chosen, rejected])
