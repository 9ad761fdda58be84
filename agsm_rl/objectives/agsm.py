"""AGSM, alignment-guided score matching (arXiv 2605.30038): learn from image-text pairs, without a reward.

For image i under prompt j: p is the live prediction, e the one under the EMA, v the regression target;
    r(i,j) = -mean (v(i) - e(i,j))²,   w(i,·) = softmax(r(i,·) / τ),   Δ(i,j) = e(i,j) - Σ_k w(i,k) e(i,k),
    L⁺ = mean over own prompts of (p - (v + γ⁺Δ))²,   L⁻ = mean over the others of (p - (v - γ⁻Δ))²,   L = L⁺ + L⁻.
These are Plackett-Luce's weights over all prompts. Bradley-Terry's, the paper's ablation, set the own prompt o against
each other one alone: Δ(i,j) = σ((r(i,o) - r(i,j)) / τ)·(e(i,j) - e(i,o)), and Δ(i,o) is the mean of the opposite sides.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Backbone, Batch, Metrics, PairBatch
from agsm_rl.objectives.grid import Grid, Groups, NoisePer, mean_or_zero, own_prompts
from agsm_rl.objectives.passes import check_at_least_one
from agsm_rl.policy import Objective, Policy
from agsm_rl.training.precision import at_least_float32, own_precision

PREFERENCES = ("plackett_luce", "bradley_terry")


def guided_score_loss(
    live: Tensor,
    ema: Tensor,
    target: Tensor,
    *,
    own: Tensor,
    temperature: float = 0.1,
    gamma_positive: float = 1.0,
    gamma_negative: float = 1.0,
    preference: Literal["plackett_luce", "bradley_terry"] = "plackett_luce",
    negatives: Tensor | None = None,
    learned: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """AGSM's loss over a grid of images and prompts.

    `live` and `ema` are predictions [B, P, C, H, W], `target` is [B, C, H, W], `own` [B] holds the column of each
    image's own prompt. Only `live` gets a gradient. Published: `temperature` τ > 0 is 0.1, `gamma_positive` 1,
    `gamma_negative` 1 for SD1.5 and SDXL and 0.1 for SD3; at 0 the negatives' loss is left out. `preference` is the
    model behind Δ; with two prompts the two are the same. The metrics' weights are always Plackett-Luce's.

    `negatives` [B, P] is true for the prompts that count as negatives of an image; None is all but its own. Prompts
    that are neither, such as equal ones, are left out of the softmax and of the losses, and L⁻ is then the mean over
    images of the mean over an image's negatives (0 where it has none).

    `learned` [B, P] is true for the negatives that L⁻ is over; None is all. Drawn at random, as many for each image, it
    leaves L⁻'s expectation as it is. `live` is read at own prompts and at these alone.

    Metrics: `positive_loss`, `negative_loss`; `win_rate`, the share of images whose own prompt has the largest weight;
    `margin`, own weight minus the largest other (both over the images that have negatives). Win rate rises whether or
    not the pictures get better.
    """
    live, ema = at_least_float32(live), at_least_float32(ema.detach())
    target = at_least_float32(target.detach())[:, None]
    is_own = own_prompts(own, live.shape[1])
    reward = -((target - ema) ** 2).mean(dim=(2, 3, 4))
    if negatives is not None:
        negatives = negatives.to(reward.device) & ~is_own
        reward = reward.masked_fill(~(negatives | is_own), -torch.inf)
    weights = torch.softmax(reward / temperature, dim=1)
    # Δ is a small difference of like predictions: half precision would round much of it away.
    with own_precision(ema.device):
        if preference == "plackett_luce":
            delta = ema - torch.einsum("bp,bpchw->bchw", weights, ema)[:, None]
        else:
            delta = _bradley_terry(ema, reward / temperature, is_own)
        if negatives is not None:
            delta = delta.masked_fill(~(negatives | is_own)[:, :, None, None, None], 0)

    def errors(guided: Tensor) -> Tensor:
        return ((live - guided) ** 2).mean(dim=(2, 3, 4))

    positive = errors(target + gamma_positive * delta)[is_own].mean()
    loss = positive
    metrics = {"positive_loss": positive.detach()}
    if live.shape[1] > 1:
        others = weights.masked_fill(is_own, -1).amax(dim=1)
        lead = weights[is_own] - others
        if negatives is not None:
            lead = lead[negatives.any(dim=1)]
        metrics["win_rate"] = mean_or_zero((lead > 0).float())
        metrics["margin"] = mean_or_zero(lead)
        if gamma_negative != 0:
            found = errors(target - gamma_negative * delta)
            chosen = negatives if learned is None else learned.to(reward.device) & ~is_own
            if chosen is None:
                negative = found[~is_own].mean()
            else:
                negative = ((found * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)).mean()
            loss = positive + negative
            metrics["negative_loss"] = negative.detach()
    return loss, metrics


def _bradley_terry(ema: Tensor, logits: Tensor, is_own: Tensor) -> Tensor:
    """Δ [B, P, C, H, W] of pairs of the own prompt and each other one."""
    lead = logits[is_own][:, None] - logits  # infinite for prompts that are left out, whose share is then 0
    apart = ema - ema[is_own][:, None]  # zero for the own prompt itself
    others = (logits.isfinite().sum(dim=1) - 1).clamp(min=1)[:, None, None, None]
    own = -torch.einsum("bp,bpchw->bchw", torch.sigmoid(-lead), apart) / others
    pairs = torch.sigmoid(lead)[:, :, None, None, None] * apart
    return torch.where(is_own[:, :, None, None, None], own[:, None], pairs)


class AGSM(Objective):
    """AGSM over pairs: a batch is cut into groups, and the members of a group are each other's negatives.

    Captions that are the same to the text encoders do not count as negatives. Own prompts are predicted with the bank
    `positive`, the others with `negative`. Published: 4 groups of 4, one noise per image and one t per step. The
    paper's ablations are `gamma_negative: 0` (ψ⁺ only), an adapter with `banks: 1`, and `preference: bradley_terry`.

    Args:
        temperature: τ > 0, how sharp the weights over prompts are. Published: 0.1.
        gamma_positive: γ⁺, how far the own prompt's target moves along Δ. Published: 1.
        gamma_negative: γ⁻, how far the other prompts' targets move against Δ. Published: 1 for SD1.5 (and SDXL in the
            paper's text), 0.1 for SD3 (and SDXL in the released script). 0 leaves the negatives out.
        preference: The preference model behind Δ. `plackett_luce` is published; `bradley_terry` is an ablation.
        negatives: Others' prompts per image and step that L⁻ is over, drawn at random: the same in expectation, with
            fewer live predictions. All of the group's prompts still weigh in Δ. Null: all, as published.
        group_size: Images per group, 2 or more; `batch_size` must be a multiple of it. Published: 4.
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
        temperature: float = 0.1,
        gamma_positive: float = 1.0,
        gamma_negative: float = 1.0,
        preference: Literal["plackett_luce", "bradley_terry"] = "plackett_luce",
        negatives: int | None = None,
        group_size: int = 4,
        groups_per_pass: int | None = None,
        images_per_pass: int | None = None,
        noise: NoisePer = "image",
    ) -> None:
        if preference not in PREFERENCES:
            raise unknown_name("preference", preference, "a preference model", PREFERENCES)
        if temperature <= 0:
            raise UserError(f"temperature: got {temperature}, but it must be above 0 (published: 0.1)")
        check_at_least_one("negatives", negatives)
        if negatives is not None and negatives >= group_size:
            raise UserError(
                f"negatives: got {negatives}, but a group of {group_size} images (group_size) has {group_size - 1} "
                "other prompts for each; give fewer, or leave it out to learn from all"
            )
        self.temperature = temperature
        self.gamma_positive = gamma_positive
        self.gamma_negative = gamma_negative
        self.preference, self.negatives = preference, negatives
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
        """The guided score loss of a batch of whole groups."""
        grid = self.groups.grid(policy, batch)
        ema = grid.predict(policy.ema)
        learned = self._learned(policy, grid, batch)
        return guided_score_loss(
            grid.predict(policy.live) if learned is None else grid.predict_some(policy.live, learned, rest=ema),
            ema,
            grid.target,
            own=grid.own,
            temperature=self.temperature,
            gamma_positive=self.gamma_positive,
            gamma_negative=self.gamma_negative,
            preference=self.preference,
            negatives=grid.negatives,
            learned=learned,
        )

    def _learned(self, policy: Policy, grid: Grid, batch: PairBatch) -> Tensor | None:
        """The negatives that are learned from, [B, P] on the CPU; None: all that there are."""
        if self.gamma_negative == 0:
            return torch.zeros(grid.columns.shape, dtype=torch.bool)
        return None if self.negatives is None else grid.some_negatives(policy.draw, batch.rows, self.negatives)
