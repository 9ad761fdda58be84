"""AGSM, alignment-guided score matching (arXiv 2605.30038): learn from image-text pairs, without a reward.

For image i under prompt j: p is the live prediction, e the one under the EMA, v the regression target;
    r(i,j) = -mean (v(i) - e(i,j))²,   w(i,·) = softmax(r(i,·) / τ),   Δ(i,j) = e(i,j) - Σ_k w(i,k) e(i,k),
    L⁺ = mean over own prompts of (p - (v + γ⁺Δ))²,   L⁻ = mean over the others of (p - (v - γ⁻Δ))²,   L = L⁺ + L⁻.
"""

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Cond, Metrics, PairBatch
from agsm_rl.policy import Policy


def guided_score_loss(
    live: Tensor,
    ema: Tensor,
    target: Tensor,
    *,
    own: Tensor,
    temperature: float = 0.1,
    gamma_positive: float = 1.0,
    gamma_negative: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """AGSM's loss over a grid of images and prompts.

    `live` and `ema` are predictions [B, P, C, H, W], `target` is [B, C, H, W], `own` [B] holds the column of each
    image's own prompt. Only `live` gets a gradient. Published: `temperature` τ > 0 is 0.1, `gamma_positive` 1,
    `gamma_negative` 1 for SD1.5 and SDXL and 0.1 for SD3; at 0 the negatives' loss is left out.

    Metrics: `positive_loss`, `negative_loss`; `win_rate`, the share of images whose own prompt has the largest weight;
    `margin`, own weight minus the largest other. Win rate rises whether or not the pictures get better.
    """
    ema, target = ema.detach().float(), target.detach().float()[:, None]
    is_own = torch.nn.functional.one_hot(own, live.shape[1]).bool()
    reward = -((target - ema) ** 2).mean(dim=(2, 3, 4))
    weights = torch.softmax(reward / temperature, dim=1)
    delta = ema - torch.einsum("bp,bpchw->bchw", weights, ema)[:, None]

    def error(guided: Tensor, chosen: Tensor) -> Tensor:
        return ((live.float() - guided) ** 2).mean(dim=(2, 3, 4))[chosen].mean()

    positive = error(target + gamma_positive * delta, is_own)
    loss = positive
    metrics = {"positive_loss": positive.detach()}
    if live.shape[1] > 1:
        others = weights.masked_fill(is_own, -1).amax(dim=1)
        metrics["win_rate"] = (weights[is_own] > others).float().mean()
        metrics["margin"] = (weights[is_own] - others).mean()
        if gamma_negative != 0:
            negative = error(target - gamma_negative * delta, ~is_own)
            loss = positive + negative
            metrics["negative_loss"] = negative.detach()
    return loss, metrics


def group_columns(batch_size: int, group_size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Which prompts each image is held against: its own group's. Columns [B, P] and `own` [B]."""
    rows = torch.arange(batch_size, device=device)
    columns = (rows // group_size * group_size)[:, None] + torch.arange(group_size, device=device)[None]
    return columns, rows % group_size


def apart(prompts: list[str]) -> list[int]:
    """An order of the rows in which equal prompts stand far from each other: a prompt is no negative of itself."""
    seen: Counter[str] = Counter()
    rounds = []
    for prompt in prompts:
        rounds.append(seen[prompt])
        seen[prompt] += 1
    return sorted(range(len(prompts)), key=lambda row: rounds[row])


class AGSM:
    """AGSM over pairs; a batch is cut into groups of `group_size`, whose members are each other's negatives.

    Own prompts are predicted with the bank `positive`, the others with `negative`. Published: 4 groups of 4, one noise
    an image and one t a step. `groups_per_pass` bounds memory: fewer groups at once, the same gradient.
    """

    consumes: ClassVar[type[Batch]] = PairBatch

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        gamma_positive: float = 1.0,
        gamma_negative: float = 1.0,
        group_size: int = 4,
        groups_per_pass: int | None = None,
    ) -> None:
        if temperature <= 0:
            raise UserError(f"temperature: got {temperature}, but it must be above 0 (published: 0.1)")
        if group_size < 2:
            raise UserError(f"group_size: got {group_size}, but a group needs 2 or more images to have negatives")
        if groups_per_pass is not None and groups_per_pass < 1:
            raise UserError(f"groups_per_pass: got {groups_per_pass}, but it must be 1 or more")
        self.temperature = temperature
        self.gamma_positive = gamma_positive
        self.gamma_negative = gamma_negative
        self.group_size = group_size
        self.groups_per_pass = groups_per_pass

    def check(self, batch_size: int) -> None:
        """The batch must be whole groups."""
        if batch_size % self.group_size:
            raise UserError(
                f"batch_size {batch_size} is no multiple of group_size {self.group_size}; change one of them"
            )

    def split(self, batch: PairBatch) -> list[tuple[PairBatch, float]]:
        """Parts of `groups_per_pass` groups; all at once by default. Images of one prompt go to different groups."""
        self.check(len(batch))
        order = apart(batch.prompts)
        batch = batch if order == sorted(order) else batch.select(torch.tensor(order))
        size = len(batch) if self.groups_per_pass is None else self.groups_per_pass * self.group_size
        parts = [batch.select(index) for index in torch.split(torch.arange(len(batch)), size)]
        return [(part, len(part) / len(batch)) for part in parts]

    def loss(self, policy: Policy, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The guided score loss of a batch of whole groups."""
        self.check(len(batch))
        x0 = batch.latents
        noise = policy.draw.noise_like(x0, batch.rows)
        t = policy.draw.shared_t(len(batch), x0.device)
        x_t, target = policy.backbone.add_noise(x0, noise, t), policy.backbone.target(x0, noise, t)
        cond = policy.backbone.encode_text(batch.prompts)
        columns, own = group_columns(len(batch), self.group_size, x0.device)
        ema = predict_grid(policy.ema, x_t, t, cond, columns, own)
        live = predict_grid(policy.live, x_t, t, cond, columns, own)
        return guided_score_loss(
            live,
            ema,
            target,
            own=own,
            temperature=self.temperature,
            gamma_positive=self.gamma_positive,
            gamma_negative=self.gamma_negative,
        )


def predict_grid(predict: Any, x_t: Tensor, t: Tensor, cond: Cond, columns: Tensor, own: Tensor) -> Tensor:
    """Predictions [B, P, C, H, W] of images x_t [B, ...] under the prompts cond[columns] [B, P].

    Own prompts use the bank `positive`, the others `negative`; `predict` is a Policy's `live` or `ema`.
    """
    image = torch.arange(len(x_t), device=x_t.device)[:, None].expand_as(columns)
    is_own = torch.nn.functional.one_hot(own, columns.shape[1]).bool()
    grid = x_t.new_zeros(*columns.shape, *x_t.shape[1:])
    for bank, chosen in (("positive", is_own), ("negative", ~is_own)):
        rows = image[chosen]
        grid = grid.index_put(
            chosen.nonzero(as_tuple=True), predict(x_t[rows], t[rows], cond[columns[chosen]], bank=bank)
        )
    return grid
