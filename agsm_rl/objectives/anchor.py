"""An anchor to the reference in score space: L = mean (p(x_t, t, prompt) - p_ref(x_t, t, prompt))².

Stacked with any reward objective, it is the price of leaving the reference (by default the base, all adapters off).
For Gaussian steps of one variance, the KL divergence between two policies is this distance up to a factor per step (as
in DPOK, arXiv 2305.16381).
"""

from typing import ClassVar

from torch import Tensor

from agsm_rl.interfaces import Batch, Metrics, PairBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Objective, Policy
from agsm_rl.training.precision import at_least_float32


def score_anchor_loss(live: Tensor, reference: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared distance of `live` from `reference`, both [B, C, H, W]; gradient through `live` alone."""
    return ((at_least_float32(live) - at_least_float32(reference.detach())) ** 2).mean(), {}


class Anchor(Objective):
    """The anchor on the images of any source, rollouts or pairs; the term's `weight` sets its strength.

    Args:
        rows_per_pass: Images that go through the denoiser at once; null is all. Fewer need less memory and give the
            same gradient.
    """

    consumes: ClassVar[type[Batch]] = PairBatch

    def __init__(self, *, rows_per_pass: int | None = None) -> None:
        check_at_least_one("rows_per_pass", rows_per_pass)
        self.rows_per_pass = rows_per_pass

    def split(self, batch: PairBatch) -> list[tuple[PairBatch, float]]:
        """Parts of `rows_per_pass` images; all at once by default."""
        return in_passes(batch, self.rows_per_pass)

    def loss(self, policy: Policy, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The distance at one noise and one noise level per image."""
        x_t, t, _, cond = policy.noised(batch)
        return score_anchor_loss(policy.live(x_t, t, cond), policy.reference(x_t, t, cond))
