"""Reward backpropagation (AlignProp, arXiv 2310.03739; DRaFT, arXiv 2309.17400): ascend the reward of one's images.

    L = -mean over images of r(decode(x_0), prompt),
where x_0 is drawn step by step from noise, and gradients flow back through the decoder and the last K steps only.
Each of these steps is computed again in the backward pass (arXiv 1604.06174), so that memory holds only one step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agsm_rl import registry
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Metrics, Reward
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Objective, Policy
from agsm_rl.training.defaults import with_defaults
from agsm_rl.training.randomness import Draw
from agsm_rl.training.sampling import Predict, step_distribution
from agsm_rl.training.scoring import WeightedReward, check_rewards, weighted_scores
from agsm_rl.training.sizes import PictureSize, Resolution, drawing_at


def reward_backprop_loss(rewards: Tensor) -> tuple[Tensor, Metrics]:
    """Minus the mean of `rewards` [B], which must carry gradients. Metric: `reward`, the mean."""
    return -rewards.mean(), {"reward": rewards.detach().mean()}


def draw_with_gradients(
    policy: Policy,
    batch: Batch,
    *,
    carries: Callable[[int], bool],
    num_steps: int,
    guidance: float,
    eta: float,
    negative_prompt: str = "",
    resolution: Resolution | None = None,
) -> Tensor:
    """One image per prompt of `batch`, [B, 3, H, W] in [0, 1], drawn in `num_steps` steps from the policy's own noise.

    Gradients flow through the predictions of those steps k (0 is the first) that `carries` names, and through all of
    the sampler's arithmetic after them. Each such step is computed again in the backward pass.
    """
    backbone, draw = policy.backbone, policy.draw
    with drawing_at(backbone, resolution):
        sampler, shape = backbone.sampler(num_steps), backbone.latent_shape
    cond = replace(batch.encode_text(backbone), crops=None)  # not those of the images that came with the prompts
    uncond = backbone.encode_negative(negative_prompt)
    like = torch.empty(len(batch), *shape, device=backbone.device, dtype=cond.embeds.dtype)

    def step(predict: Predict, k: int, x_t: Tensor) -> Tensor:
        mean, std = step_distribution(predict, sampler, k, x_t, cond, uncond, guidance=guidance, eta=eta)
        noise = draw.noise_like(x_t, batch.rows, purpose=f"step {k}") if eta else 0.0
        return (mean + std * noise).to(x_t.dtype)

    x = draw.noise_like(like, batch.rows, purpose="start")
    for k in range(num_steps):
        if carries(k):
            again: Any = checkpoint(step, policy.live, k, x, use_reentrant=False, preserve_rng_state=False)
            x = again
        else:
            x = step(torch.no_grad()(policy.live), k, x)
    return backbone.decode(x)


class RewardBackprop(Objective):
    """Reward backpropagation for the prompts of any batch; only rewards that are differentiable in the image.

    Args:
        rewards: Rewards by name, with weights or options: `{brightness: 1.0}`. Their weighted sum is ascended, each in
            its own unit.
        num_steps: Denoising steps per image.
        guidance: Guidance scale with which images are drawn; 1 is none and costs half.
        eta: Noise of the sampler's steps, 0 or more. With 0, only the first noise is random.
        last_steps: K: gradients flow through the last K denoising steps. 1 is DRaFT-1; a pair [a, b] draws K anew for
            each update, uniformly from a to b, as AlignProp's paper does.
        negative_prompt: What guidance leads away from.
        images_per_pass: Images that are drawn and learned from at once; null is all. Fewer need less memory and give
            the same gradient.
        resolution: Pixels per side, or [height, width], of the images. Null: the backbone's.
    """

    consumes: ClassVar[type[Batch]] = Batch
    draws_t: ClassVar[bool] = False

    def __init__(
        self,
        rewards: Sequence[WeightedReward | tuple[Reward, float]] | Mapping[str, float],
        *,
        num_steps: int = 50,
        guidance: float = 5.0,
        eta: float = 0.0,
        last_steps: int | tuple[int, int] = 1,
        negative_prompt: str = "",
        images_per_pass: int | None = None,
        resolution: PictureSize | None = None,
    ) -> None:
        self.rewards = check_rewards(rewards)
        for one in self.rewards:
            _check_differentiable(one.reward)
            if one.normalise != "raw":
                raise UserError(
                    f"rewards.{one.name}: normalise '{one.normalise}' is for rollouts, whose images are compared; here "
                    f"the gradient of the score itself is followed: leave it raw, and set its size by the weight"
                )
        check_at_least_one("num_steps", num_steps)
        check_at_least_one("images_per_pass", images_per_pass)
        if eta < 0:
            raise UserError(f"eta: got {eta}, but it must be 0 or more")
        fewest, most = (last_steps, last_steps) if isinstance(last_steps, int) else last_steps
        if isinstance(last_steps, bool) or not 1 <= fewest <= most <= num_steps:
            raise UserError(
                f"last_steps: got {last_steps}, but it must lie between 1 and num_steps ({num_steps}), or be two such "
                f"numbers, the smaller first"
            )
        self.num_steps, self.guidance, self.eta = num_steps, guidance, eta
        self.fewest, self.most = fewest, most
        self.negative_prompt, self.images_per_pass, self.resolution = negative_prompt, images_per_pass, resolution

    def split(self, batch: Batch) -> list[tuple[Batch, float]]:
        """Parts of `images_per_pass` prompts; all at once by default."""
        return in_passes(batch, self.images_per_pass)

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        """Minus the mean reward of one image per prompt; each reward's mean is a metric under its name."""
        images = self.images(policy, batch)
        total, scores = weighted_scores(self.rewards, images, batch.prompts, batch.metadata)
        if torch.is_grad_enabled() and not total.requires_grad:
            names = ", ".join(f"'{one.name}'" for one in self.rewards)
            raise UserError(
                f"rewards: the score of {names} carries no gradient, although the reward is declared differentiable"
            )
        loss, metrics = reward_backprop_loss(total)
        return loss, {**metrics, **{f"reward/{name}": score.detach().mean() for name, score in scores.items()}}

    def images(self, policy: Policy, batch: Batch) -> Tensor:
        """One image per prompt, [B, 3, H, W] in [0, 1], with the gradients of the last steps."""
        first = self.num_steps - self._last_steps(policy.draw)
        return draw_with_gradients(
            policy,
            batch,
            carries=lambda k: k >= first,
            num_steps=self.num_steps,
            guidance=self.guidance,
            eta=self.eta,
            negative_prompt=self.negative_prompt,
            resolution=self.resolution,
        )

    def _last_steps(self, draw: Draw) -> int:
        """K of this update, the same for all its passes and processes."""
        share = float(draw.uniform(torch.zeros(1, dtype=torch.long), purpose="last steps"))
        return self.fewest + int(share * (self.most - self.fewest + 1))


def _check_differentiable(reward: Reward) -> None:
    if not reward.differentiable:
        fitting = registry.names_that("rewards", lambda kind: with_defaults(kind, Reward).differentiable)
        raise UserError(
            f"rewards: '{reward.name}' has no gradient in the image, which reward backpropagation needs; rewards that "
            f"work: {', '.join(fitting)}. Objectives that learn from '{reward.name}' on `rollouts`: ddpo, flow_grpo, "
            "diffusion_nft."
        )
