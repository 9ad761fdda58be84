"""SoftREPA, contrastive alignment with soft text tokens (arXiv 2503.08250): AGSM's predecessor and baseline.

For image i under prompt j, with p the prediction and v the regression target:
    s(i,j) = 4·exp(-mean (v(i) - p(i,j))² / 0.07),
    L = mean over images of  -log softmax(s(i,·)) at the own prompt  +  d · mean over own prompts of (v - p)².
"""

from typing import ClassVar

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Batch, Metrics, PairBatch
from agsm_rl.objectives.grid import Groups, NoisePer, mean_or_zero, own_prompts
from agsm_rl.policy import Objective, Policy
from agsm_rl.training.precision import at_least_float32


def softrepa_loss(
    live: Tensor,
    target: Tensor,
    *,
    own: Tensor,
    temperature: float = 0.07,
    scale: float = 4.0,
    positive_weight: float = 10.0,
    negatives: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """SoftREPA's loss over a grid of images and prompts.

    `live` are predictions [B, P, C, H, W], `target` is [B, C, H, W], `own` [B] holds the column of each image's own
    prompt. Published: `temperature` > 0 is 0.07, `scale` 4, `positive_weight` d 10 for SD1.5 and SDXL, 0 for SD3.

    `negatives` [B, P] is true for the prompts that count as negatives of an image; None is all but its own. Prompts
    that are neither, such as equal ones, are left out of the softmax.

    Metrics: `contrastive_loss`, `positive_loss` (own prompts' error); `win_rate`, the share of images whose own prompt
    predicts best; `margin`, own logit minus the largest other (both over the images that have negatives).
    """
    errors = ((at_least_float32(live) - at_least_float32(target.detach())[:, None]) ** 2).mean(dim=(2, 3, 4))
    logits = scale * torch.exp(-errors / temperature)
    is_own = own_prompts(own, live.shape[1])
    if negatives is not None:
        negatives = negatives.to(logits.device) & ~is_own
        logits = logits.masked_fill(~(negatives | is_own), -torch.inf)
    contrastive = torch.nn.functional.cross_entropy(logits, own.long())
    positive = errors[is_own].mean()
    metrics = {"contrastive_loss": contrastive.detach(), "positive_loss": positive.detach()}
    if live.shape[1] > 1:
        lead = logits.detach()[is_own] - logits.detach().masked_fill(is_own, -1).amax(dim=1)
        if negatives is not None:
            lead = lead[negatives.any(dim=1)]
        metrics["win_rate"] = mean_or_zero((lead > 0).float())
        metrics["margin"] = mean_or_zero(lead)
    return contrastive + positive_weight * positive, metrics


class SoftREPA(Objective):
    """SoftREPA over pairs: a batch is cut into groups, and the members of a group are each other's negatives.

    All prompts use the bank `positive`, so an adapter needs no second bank. The logits are `scale` · exp(−error /
    `temperature`).

    Args:
        temperature: Above 0; how fast a logit falls with the prediction's error. Published: 0.07.
        scale: Above 0; the largest logit. Published: 4.
        positive_weight: d, the weight of the own prompts' error beside the contrastive loss. Published: 10 for SD1.5
            and SDXL, 0 for SD3.
        group_size: Images per group, 2 or more; `batch_size` must be a multiple of it.
        groups_per_pass: Groups that go through the denoiser at once; null is all. Fewer need less memory and give the
            same gradient.
        images_per_pass: Images that go through the denoiser at once, each under all prompts of its group; null is all
            of the pass. Less memory still, the same gradient.
        noise: What has a noise of its own: each `image`, as in the paper, or each `group`, whose images share one, as
            in the released AGSM code.
    """

    consumes: ClassVar[type[Batch]] = PairBatch

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        scale: float = 4.0,
        positive_weight: float = 10.0,
        group_size: int = 4,
        groups_per_pass: int | None = None,
        images_per_pass: int | None = None,
        noise: NoisePer = "image",
    ) -> None:
        for name, value in {"temperature": temperature, "scale": scale}.items():
            if value <= 0:
                raise UserError(f"{name}: got {value}, but it must be above 0 (published: 0.07 and 4)")
        if positive_weight < 0:
            raise UserError(f"positive_weight: got {positive_weight}, but it must be 0 or more (published: 10, SD3: 0)")
        self.temperature = temperature
        self.scale = scale
        self.positive_weight = positive_weight
        self.groups = Groups(group_size, groups_per_pass, noise, images_per_pass)

    def check(self, batch_size: int) -> None:
        """The batch must be whole groups."""
        self.groups.check(batch_size)

    def check_prompts(self, prompts: list[str], backbone: Backbone) -> None:
        """There must be as many different prompts as a group has images."""
        self.groups.check_prompts(prompts, backbone)

    def split(self, batch: PairBatch) -> list[tuple[PairBatch, float]]:
        """Parts of `groups_per_pass` groups or `images_per_pass` images; all at once by default.

        Images of one prompt go to different groups.
        """
        return self.groups.split(batch)

    def loss(self, policy: Policy, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The contrastive loss of a batch of whole groups."""
        grid = self.groups.grid(policy, batch)
        return softrepa_loss(
            grid.predict(policy.live, others="positive"),
            grid.target,
            own=grid.own,
            temperature=self.temperature,
            scale=self.scale,
            positive_weight=self.positive_weight,
            negatives=grid.negatives,
        )
