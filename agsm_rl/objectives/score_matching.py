"""Score matching, plain diffusion fine-tuning on pairs (arXiv 2006.11239, eq. 14): regress on the true target.

L = mean over images of (p(x_t, t, prompt) - v)²,  with one noise and one noise level t per image.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Cond, Metrics, PairBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Objective, Policy
from agsm_rl.training.precision import at_least_float32


def score_matching_loss(live: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared error of predictions `live` from `target`, both [B, C, H, W]; gradient through `live` alone."""
    return ((at_least_float32(live) - at_least_float32(target.detach())) ** 2).mean(), {}


class ScoreMatching(Objective):
    """Score matching over pairs, with one noise and one noise level per image.

    Args:
        caption_dropout: Share of captions in [0, 1) that is replaced by "". It trains the
            unconditional prediction too, which guidance needs (arXiv 2207.12598 uses 0.1 to 0.2).
        rows_per_pass: Images that go through the denoiser at once; null is all. Fewer need less memory and give the
            same gradient.
    """

    consumes: ClassVar[type[Batch]] = PairBatch

    def __init__(self, *, caption_dropout: float = 0.0, rows_per_pass: int | None = None) -> None:
        if not 0 <= caption_dropout < 1:
            raise UserError(f"caption_dropout: got {caption_dropout}, but it must lie in [0, 1)")
        check_at_least_one("rows_per_pass", rows_per_pass)
        self.caption_dropout = caption_dropout
        self.rows_per_pass = rows_per_pass

    def split(self, batch: PairBatch) -> list[tuple[PairBatch, float]]:
        """Parts of `rows_per_pass` pairs; all at once by default."""
        return in_passes(batch, self.rows_per_pass)

    def loss(self, policy: Policy, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The mean squared error of the batch."""
        x_t, t, target, cond = policy.noised(batch)
        dropped = policy.draw.uniform(batch.rows, purpose="caption dropout") < self.caption_dropout
        if dropped.any():
            rows = torch.where(dropped, len(batch), torch.arange(len(batch)))
            texts = Cond.cat([replace(cond, crops=None), policy.backbone.encode_text([""])])
            cond = texts[rows].of_pictures(cond)
        return score_matching_loss(policy.live(x_t, t, cond), target)
