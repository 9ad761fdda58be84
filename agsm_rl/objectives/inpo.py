"""InPO, inversion preference optimisation (arXiv 2503.18454): Diffusion-DPO on images that are inverted, not noised.

Diffusion-DPO hides an image under noise that has nothing to do with it. Here the policy itself inverts the image by
DDIM up to the level t, and the noise that this amounts to is the target:
    x_t = the inversion of x0,    ε = (x_t - a·x0) / b,    where noising at t is a·x0 + b·noise;
    the loss is Diffusion-DPO's with the errors at these x_t.
The released code (JaydenLyh/InPO) is for models that predict noise. The same steps along the flow's ODE invert an image
for SD3's kind of model, which the authors did not try.
"""

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Cond, PairBatch
from agsm_rl.objectives.diffusion_dpo import DiffusionDPO
from agsm_rl.policy import Noised, Policy
from agsm_rl.training.mixing import CLEAN, Mix, mix_at


def inversion_step(x: Tensor, prediction: Tensor, below: Mix, above: Mix) -> Tensor:
    """One DDIM inversion step of `x` [B, C, h, w], from the level of `below` up to that of `above`.

    `prediction` [B, C, h, w] is the model's for `x` at the upper level, as diffusers' DDIMInverseScheduler has it.
    """
    determinant = below.signal * above.target_noise - below.noise * above.target_signal
    image = (above.target_noise * x - below.noise * prediction) / determinant
    noise = (below.signal * prediction - above.target_signal * x) / determinant
    return above.signal * image + above.noise * noise


def ddim_std(below: Mix, above: Mix) -> Tensor:
    """Standard deviation [B, 1, 1, 1] of DDIM's step at eta = 1 between two levels, of latents scaled as at `below`."""
    share_below = below.signal**2 / (below.signal**2 + below.noise**2)
    share_above = above.signal**2 / (above.signal**2 + above.noise**2)
    variance = (1 - share_below) / (1 - share_above) * (1 - share_above / share_below)
    return (variance.clamp(min=0) * (below.signal**2 + below.noise**2)).sqrt()


class InPO(DiffusionDPO):
    """InPO over preferences: those of a data set, or of own images through the view `best_against_worst`.

    Args:
        beta: β > 0. The larger it is, the more closely the policy is held to the reference. Published: 2000 (SD1.5).
        inversion_steps: Levels of the inversion, evenly spaced over all noise levels; an image is taken through those
            below its t. Published: 10, of which an image passes half on average, each a forward pass without gradient.
        last_step: Whether a last step leads from the highest level below t to t itself, as the paper defines x_t. The
            released code leaves it out: its image lies up to a level's width below t, and its target makes up for that.
        inversion_eta: Share of DDIM's noise that is added after each inversion step, in [0, 1]. Published: 0.1.
        rows_per_pass: Pairs of images that go through the denoiser at once; null is all. Fewer need less memory and
            give the same gradient.
    """

    def __init__(
        self,
        *,
        beta: float = 2000.0,
        inversion_steps: int = 10,
        inversion_eta: float = 0.1,
        last_step: bool = True,
        rows_per_pass: int | None = None,
    ) -> None:
        super().__init__(beta=beta, rows_per_pass=rows_per_pass)
        if inversion_steps < 1:
            raise UserError(f"inversion_steps: got {inversion_steps}, but it must be 1 or more (published: 10)")
        if not 0 <= inversion_eta <= 1:
            raise UserError(f"inversion_eta: got {inversion_eta}, but it must lie in [0, 1] (published: 0.1)")
        self.inversion_steps = inversion_steps
        self.inversion_eta = inversion_eta
        self.last_step = last_step

    def noised(self, policy: Policy, images: PairBatch) -> Noised:
        """The images inverted by the policy up to their levels, and the noise that stands between; no gradient."""
        cond = images.encode_text(policy.backbone)
        t = policy.draw.t(images.rows)  # on the CPU: it decides which rows take part in a step
        x_t = self._inverted(policy, images, cond, t)
        t = t.to(images.latents.device)
        mix = mix_at(policy.backbone, images.latents, t)
        noise = ((x_t - mix.signal * images.latents.float()) / mix.noise).to(images.latents)
        x_t = x_t.to(images.latents)
        return Noised(x_t, t, policy.backbone.target(images.latents, noise, t), cond)

    @torch.no_grad()
    def _inverted(self, policy: Policy, images: PairBatch, cond: Cond, t: Tensor) -> Tensor:
        """The latents at their levels `t` [B], or at the highest inversion level that is not above, in float32."""
        x = images.latents.float()
        levels = [k / self.inversion_steps for k in range(self.inversion_steps + 1)]
        for k in range(self.inversion_steps):
            index = (t >= levels[k]).nonzero().flatten()
            if len(index) == 0:
                break
            below, here, above = (
                _at(policy.backbone, x, levels[n], len(index)) if n >= 0 else CLEAN for n in (k - 1, k, k + 1)
            )
            rows, level = index.to(x.device), torch.full((len(index),), levels[k], device=x.device)
            prediction = policy.live(x[rows].to(images.latents), level, cond[rows]).float()
            moved = inversion_step(x[rows], prediction, below, here)
            if self.inversion_eta > 0:
                noise = policy.draw.noise_like(moved, images.rows[index], purpose=f"inversion{k}")
                moved = moved + self.inversion_eta * ddim_std(here, above) * noise
            x = x.index_copy(0, rows, moved)
        if not self.last_step:
            return x
        reached = (t * self.inversion_steps).floor() / self.inversion_steps
        here, above = (mix_at(policy.backbone, x, level.to(x.device)) for level in (reached, t))
        prediction = policy.live(x.to(images.latents), t.to(x.device), cond).float()
        return inversion_step(x, prediction, here, above)


def _at(backbone: Backbone, like: Tensor, level: float, count: int) -> Mix:
    return mix_at(backbone, like, torch.full((count,), min(level, 1 - 1e-6), device=like.device))
