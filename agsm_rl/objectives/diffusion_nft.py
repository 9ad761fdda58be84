"""DiffusionNFT, negative-aware fine-tuning (arXiv 2509.16117): rewards on the forward process, no path kept.

For an image of reward r in [0, 1] and its target v, with one noise level t per image and the old policy's v_old,
    L = mean of  r·(v⁺ - v)² + (1 - r)·(v⁻ - v)²,   v⁺ = (1 - β)·v_old + β·p,   v⁻ = (1 + β)·v_old - β·p.
A good image draws the prediction p towards itself; a bad one pushes it away, as seen from the old policy. As released,
each squared error is divided by its own mean absolute error and multiplied by t, and L by `advantage_scale` / β.
"""

from torch import Tensor

from agsm_rl.interfaces import Metrics, RewardedBatch
from agsm_rl.objectives.forward_process import (
    ForwardProcess,
    check_above_zero,
    check_weights,
    matching_error,
    optimality,
    reference_prediction,
)
from agsm_rl.policy import Noised, Policy
from agsm_rl.training.old_policy import OldPolicy
from agsm_rl.training.precision import at_least_float32


def nft_loss(
    live: Tensor,
    old: Tensor,
    target: Tensor,
    reward: Tensor,
    *,
    beta: float = 1.0,
    adaptive: bool = False,
    t: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """DiffusionNFT's loss over predictions [B, C, H, W] and rewards [B] in [0, 1]; gradient through `live` alone.

    `beta` > 0 is the size of the implicit policies' step (paper's experiments: 0.1 to 1). `adaptive` divides each
    image's squared error by its own mean absolute error, which is not differentiated: the paper's self-normalised
    weight. `t` [B], the noise levels, are factors of the images' losses. With both, and for a flow, the authors' loss,
    over errors of x0, is 5 / β times this one.

    Metrics: `positive_error` and `negative_error`, the mean errors of v⁺ and v⁻, without t; `optimality`, the mean
    reward r; `old_gap`, mean (p - v_old)², how far the policy has moved from the one that drew the images.
    """
    for name, given in {"reward": reward, "t": reward if t is None else t}.items():
        if given.shape != live.shape[:1]:
            raise ValueError(f"{name}: got the shape {tuple(given.shape)}; expected one per image, ({len(live)},)")
    live, old = at_least_float32(live), at_least_float32(old.detach())
    target, reward = at_least_float32(target.detach()), at_least_float32(reward.detach())

    positive = matching_error((1 - beta) * old + beta * live, target, adaptive=adaptive)
    negative = matching_error((1 + beta) * old - beta * live, target, adaptive=adaptive)
    losses = reward * positive + (1 - reward) * negative
    if t is not None:
        losses = losses * at_least_float32(t.detach()).to(losses.device)
    return losses.mean(), {
        "positive_error": positive.detach().mean(),
        "negative_error": negative.detach().mean(),
        "optimality": reward.mean(),
        "old_gap": ((live.detach() - old) ** 2).mean(),
    }


class DiffusionNFT(ForwardProcess):
    """DiffusionNFT on rewarded images; the old policy, which may also draw them, is the EMA or one of the term's own.

    Advantages become r = ½ + ½·clip(advantage / `advantage_scale`, −1, 1). Any sampler works: with `eta: 0`,
    rollouts keep no path.

    Args:
        beta: β > 0, the size of the implicit policies' step. The paper's experiments use 0.1 to 1.
        advantage_scale: Above 0; the advantage at which r reaches 0 or 1. Published: 5.
        adaptive: Divide each image's squared error by its own mean absolute error, the paper's self-normalised weight.
        t_weighted: Multiply each image's loss by its noise level t, as released: a flow's error of x0 is t times that
            of its prediction.
        scaled: Multiply the loss by `advantage_scale` / β, as released.
        old: How the old policy follows the trained parameters, {decay, every}: `decay` is the share that stays at an
            update, a number or a schedule {step: decay}; `every` is `draw`, after the last step that learns from a
            draw, or a number of the term's turns. Released: {decay: {0: 0.0, 500: 0.5}, every: draw},
            with `drawn_by: old` in the rollouts. Null: the old policy is the EMA, shared with all terms.
        sampler_steps: Take the noise levels from the sampler's schedule of so many steps (released: 10) within the
            term's `t`. Null: uniform.
        levels_per_image: Noise levels per image and step, each with new noise; of a sampler's, all different.
            Released: 9.
        kl_weight: Weight of the mean squared distance from the reference's prediction, beside the loss. Released: 1e-4.
            0 saves its forward pass.
        rows_per_pass: Images that go through the denoiser at once; null is all. Fewer need less memory and give the
            same gradient.
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        advantage_scale: float = 5.0,
        adaptive: bool = True,
        t_weighted: bool = True,
        scaled: bool = True,
        old: OldPolicy | None = None,
        sampler_steps: int | None = None,
        levels_per_image: int = 1,
        kl_weight: float = 0.0,
        rows_per_pass: int | None = None,
    ) -> None:
        check_above_zero(beta=beta, advantage_scale=advantage_scale)
        check_weights(kl_weight=kl_weight)
        super().__init__(
            old=old, sampler_steps=sampler_steps, levels_per_image=levels_per_image, rows_per_pass=rows_per_pass
        )
        self.beta, self.advantage_scale, self.adaptive = beta, advantage_scale, adaptive
        self.t_weighted, self.scaled, self.kl_weight = t_weighted, scaled, kl_weight

    def loss_of(self, policy: Policy, batch: RewardedBatch, seen: Noised) -> tuple[Tensor, Metrics]:
        """The loss of the images; their r is ½ for one as good as the others of its prompt."""
        x_t, t, target, cond = seen
        old, reward = policy.old(x_t, t, cond), optimality(batch.advantages, self.advantage_scale)
        live, weight = policy.live(x_t, t, cond), t if self.t_weighted else None
        loss, metrics = nft_loss(live, old, target, reward, beta=self.beta, adaptive=self.adaptive, t=weight)
        if self.scaled:
            loss = loss * (self.advantage_scale / self.beta)
        if self.kl_weight:
            gap = matching_error(live, reference_prediction(policy, seen)).mean()
            loss, metrics = loss + self.kl_weight * gap, metrics | {"reference_gap": gap.detach()}
        return loss, metrics
