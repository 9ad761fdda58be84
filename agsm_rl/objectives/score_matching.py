"""Score matching, plain diffusion fine-tuning on pairs (arXiv 2006.11239, eq. 14): regress on the true target.

L = mean over images of (p(x_t, t, prompt) - v)²,  a noise and a noise level t an image.
"""

from typing import ClassVar

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Cond, Metrics, PairBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Policy
from agsm_rl.training.precision import at_least_float32


def score_matching_loss(live: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared error of predictions `live` from `target`, both [B, C, H, W]; gradient through `live` alone."""
    return ((at_least_float32(live) - at_least_float32(target.detach())) ** 2).mean(), {}


class ScoreMatching:
    """Score matching over pairs, with a noise and a noise level an image.

    `caption_dropout` in [0, 1) is the share of captions replaced by "", which keeps the unconditional prediction in
    step for guidance (arXiv 2207.12598 uses 0.1 to 0.2). `rows_per_pass` bounds memory: fewer images at once, the same
    gradient.
    """

    consumes: ClassVar[type[Batch]] = PairBatch

    def __init__(self, *, caption_dropout: float = 0.0, rows_per_pass: int | None = None) -> None:
        if not 0 <= caption_dropout < 1:
            raise UserError(f"caption_dropout: got {caption_dropout}, but it must lie in [0, 1)")
        check_at_least_one("rows_per_pass", rows_per_pass)
        self.caption_dropout = caption_dropout
        self.rows_per_pass = rows_per_pass

    def check(self, batch_size: int) -> None:
        """Any number of pairs will do."""

    def split(self, batch: PairBatch) -> list[tuple[PairBatch, float]]:
        """Parts of `rows_per_pass` pairs; all at once by default."""
        return in_passes(batch, self.rows_per_pass)

    def loss(self, policy: Policy, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The mean squared error of the batch."""
        backbone, draw, x0 = policy.backbone, policy.draw, batch.latents
        noise, t = draw.noise_like(x0, batch.rows), draw.t(batch.rows, x0.device)
        cond = batch.encode_text(backbone)
        dropped = draw.uniform(batch.rows, purpose="caption dropout") < self.caption_dropout
        if dropped.any():
            rows = torch.where(dropped, len(batch), torch.arange(len(batch)))
            cond = Cond.cat([cond, backbone.encode_text([""])])[rows]
        live = policy.live(backbone.add_noise(x0, noise, t), t, cond)
        return score_matching_loss(live, backbone.target(x0, noise, t))
