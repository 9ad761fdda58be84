"""DDIM steps as Gaussian transitions (Denoising Diffusion Implicit Models, arXiv 2010.02502, eq. 12 and 16).

Policy-gradient objectives need the mean and the standard deviation of a step, not a sample of it. Both are read off the
scheduler's public `step()`, so that they are what diffusers draws with, and not a second copy of its formulas.
"""

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

# What Stable Diffusion was trained with; a pipeline whose scheduler's configuration leaves them out (PNDM, Euler, …)
# would otherwise get DDIM's defaults, which are for images in [-1, 1].
LATENT_DIFFUSION = {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}


def ddim_scheduler(config: dict[str, Any]) -> Any:
    """A DDIMScheduler on the noise schedule of any pipeline scheduler's `config`; it never clips latents to [-1, 1]."""
    # diffusers replaces values listed under `_use_default_values` by DDIM's own defaults, silently.
    kept = {name: value for name, value in config.items() if name != "_use_default_values"}
    return DDIMScheduler.from_config({**LATENT_DIFFUSION, **kept, "clip_sample": False})


class DDIMSampler:
    """`num_steps` DDIM steps: `t` [K] descending, and `transition` as in `interfaces.Sampler`."""

    noises = ("ddim",)

    def __init__(self, config: dict[str, Any], num_steps: int, device: torch.device) -> None:
        self.scheduler = ddim_scheduler(config)
        self.scheduler.set_timesteps(num_steps)
        self.timesteps: list[int] = self.scheduler.timesteps.tolist()
        # The middle of a timestep's interval: no rounding can turn it into its neighbour.
        middles = [(timestep + 0.5) / self.scheduler.config.num_train_timesteps for timestep in self.timesteps]
        # Of a model without data the noise levels are known all the same: terms choose among them.
        self.t = torch.tensor(middles, device="cpu" if device.type == "meta" else device)

    def transition(self, k: int, x_t: Tensor, prediction: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and standard deviation σ (0-d) of step `k`, both on x_t's device and of its dtype.

        σ is 0 when `eta` is 0, and also in a last step that ends on a noiseless image (`set_alpha_to_one`).
        """
        # A step is mean + σ · variance_noise: noise 0 gives the mean.
        step = self.scheduler.step(prediction, self.timesteps[k], x_t, eta=eta, variance_noise=torch.zeros_like(x_t))
        std, alpha = self._std(k, eta), self._alpha_after(k)
        if 1 - alpha - std.to(alpha) ** 2 < 0:
            # From pure noise (zero terminal SNR) η = 1 keeps none of it, 1 − ᾱ' = σ². Rounding can put the difference
            # below 0, of which `step` takes the root; clamped at 0, the mean is the predicted image's part alone.
            return (alpha.sqrt().to(x_t) * step.pred_original_sample).to(x_t), std.to(x_t)
        return step.prev_sample, std.to(x_t)

    def _std(self, k: int, eta: float) -> Tensor:
        # From a zero sample and a zero prediction the mean is 0 for every prediction type, and noise 1 leaves σ alone.
        # σ is proportional to η: half of it keeps `step` from the root of a number below 0, and doubling is exact.
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        step = self.scheduler.step(zero, self.timesteps[k], zero, eta=eta / 2, variance_noise=one)
        std: Tensor = 2 * step.prev_sample[0]
        return std

    def _alpha_after(self, k: int) -> Tensor:
        """ᾱ' after step `k`, 0-d, as `step` reads it."""
        scheduler = self.scheduler
        timestep = self.timesteps[k] - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alpha: Tensor = scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod
        return alpha
