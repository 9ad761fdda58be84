"""DiffusionNFT, negative-aware fine-tuning (arXiv 2509.16117): rewards on the forward process, no path kept.

For an image of reward r in [0, 1] and its target v, with one noise level t per image and the old policy's v_old,
    L = mean of  r·(v⁺ - v)² + (1 - r)·(v⁻ - v)²,   v⁺ = (1 - β)·v_old + β·p,   v⁻ = (1 + β)·v_old - β·p.
A good image draws the prediction p towards itself; a bad one pushes it away, as seen from the old policy.
"""

from typing import ClassVar

from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Metrics, RewardedBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Objective, Policy
from agsm_rl.training.precision import at_least_float32


def nft_loss(
    live: Tensor, old: Tensor, target: Tensor, reward: Tensor, *, beta: float = 1.0, adaptive: bool = False
) -> tuple[Tensor, Metrics]:
    """DiffusionNFT's loss over predictions [B, C, H, W] and rewards [B] in [0, 1]; gradient through `live` alone.

    `beta` > 0 is the size of the implicit policies' step (paper's experiments: 0.1 to 1). `adaptive` divides each
    image's squared error by its own mean absolute error, which is not differentiated: the paper's self-normalised
    weight, taken here over the prediction.

    Metrics: `positive_error` and `negative_error`, the mean squared errors of v⁺ and v⁻; `reward`, its mean; `old_gap`,
    mean (p - v_old)², how far the policy has moved from the one that drew the images.
    """
    if reward.shape != live.shape[:1]:
        raise ValueError(f"reward: got the shape {tuple(reward.shape)}; expected one per image, ({len(live)},)")
    live, old = at_least_float32(live), at_least_float32(old.detach())
    target, reward = at_least_float32(target.detach()), at_least_float32(reward.detach())

    def error(implicit: Tensor) -> Tensor:
        difference = implicit - target
        squared = (difference**2).mean(dim=(1, 2, 3))
        return squared / difference.detach().abs().mean(dim=(1, 2, 3)).clamp(min=1e-5) if adaptive else squared

    positive = error((1 - beta) * old + beta * live)
    negative = error((1 + beta) * old - beta * live)
    loss = (reward * positive + (1 - reward) * negative).mean()
    return loss, {
        "positive_error": positive.detach().mean(),
        "negative_error": negative.detach().mean(),
        "reward": reward.mean(),
        "old_gap": ((live.detach() - old) ** 2).mean(),
    }


class DiffusionNFT(Objective):
    """DiffusionNFT on rewarded images; the old policy is the EMA, which may also draw them (`drawn_by: ema`).

    Advantages become r = ½ + ½·clip(advantage / `advantage_scale`, −1, 1). Any sampler works: with `eta: 0`,
    rollouts keep no path.

    Args:
        beta: β > 0, the size of the implicit policies' step. The paper's experiments use 0.1 to 1.
        advantage_scale: Above 0; the advantage at which r reaches 0 or 1.
        adaptive: Divide each image's squared error by its own mean absolute error, the paper's self-normalised weight.
        rows_per_pass: Images that go through the denoiser at once; null is all. Fewer need less memory and give the
            same gradient.
    """

    consumes: ClassVar[type[Batch]] = RewardedBatch

    def __init__(
        self,
        *,
        beta: float = 1.0,
        advantage_scale: float = 1.0,
        adaptive: bool = False,
        rows_per_pass: int | None = None,
    ) -> None:
        for name, value in {"beta": beta, "advantage_scale": advantage_scale}.items():
            if value <= 0:
                raise UserError(f"{name}: got {value}, but it must be above 0")
        check_at_least_one("rows_per_pass", rows_per_pass)
        self.beta, self.advantage_scale, self.adaptive = beta, advantage_scale, adaptive
        self.rows_per_pass = rows_per_pass

    def split(self, batch: RewardedBatch) -> list[tuple[RewardedBatch, float]]:
        """Parts of `rows_per_pass` images; all at once by default."""
        return in_passes(batch, self.rows_per_pass)

    def reward(self, advantages: Tensor) -> Tensor:
        """r in [0, 1] of advantages [B]; ½ for an image as good as the others of its prompt."""
        return 0.5 + 0.5 * (advantages / self.advantage_scale).clamp(-1, 1)

    def loss(self, policy: Policy, batch: RewardedBatch) -> tuple[Tensor, Metrics]:
        """The loss of the batch, with one noise and one noise level per image."""
        x_t, t, target, cond = policy.noised(batch)
        old, reward = policy.ema(x_t, t, cond), self.reward(batch.advantages)
        return nft_loss(policy.live(x_t, t, cond), old, target, reward, beta=self.beta, adaptive=self.adaptive)
