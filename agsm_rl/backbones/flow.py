"""Steps of a flow x_t = (1 − t)·x0 + t·noise as Gaussian transitions, in three forms of noise.

All step from σ to σ' with Δ = σ' − σ < 0, by the two ends that a prediction v implies: x̂0 = x_t − σ·v and
n̂ = x_t + (1 − σ)·v. Without noise each is the ODE's Euler step, x_t + v·Δ = (1 − σ')·x̂0 + σ'·n̂.

`flow_sde`: Flow-GRPO's SDE (arXiv 2505.05470, eq. 9) by Euler and Maruyama, see `flow_sde_step`.
`cps`: coefficients-preserving sampling (arXiv 2509.05952), N( (1 − σ')·x̂0 + √(σ'² − s²)·n̂, s² ) with
    s = σ'·sin(a·π/2): the coefficients of image and noise stay the schedule's, so that no noise is left over.
`ddim`: the same mean with DDIM's s (arXiv 2010.02502), s = η·σ'·√(1 − ((1 − σ)·σ' / ((1 − σ')·σ))²). For a known image
    x_{σ'} has exactly the ODE's mean and variance, however large the step. For small steps it is Flow-GRPO's SDE with
    a = √2·η; η = 1 is ancestral sampling. Late steps are almost noiseless, so that their 1/s² rules a policy gradient.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.training.precision import at_least_float32


def flow_scheduler(config: dict[str, Any]) -> Any:
    """A FlowMatchEulerDiscreteScheduler on the schedule of a scheduler's `config`; UserError if it has none."""
    if "shift" not in config:
        raise UserError(
            f"backbone.checkpoint: its scheduler, {config.get('_class_name')}, has no shift; SD3's is a "
            "FlowMatchEulerDiscreteScheduler."
        )
    # diffusers replaces values listed under `_use_default_values` by its defaults, silently.
    return FlowMatchEulerDiscreteScheduler.from_config(
        {name: value for name, value in config.items() if name != "_use_default_values"}
    )


def flow_sde_step(
    x_t: Tensor,
    prediction: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float,
    sigma_max: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's step of the SDE (arXiv 2505.05470): its mean, like x_t, and its standard deviation, like `sigma`.

        mean = x·(1 + σ_t²/(2σ)·Δ) + v·(1 + σ_t²·(1 − σ)/(2σ))·Δ,    std = σ_t·√|Δ|,    σ_t = a·√(σ / (1 − σ)),
    with Δ = σ' − σ and a = `noise_level` (published: 0.7). Where σ is 1 (the first step), `sigma_max`, the schedule's
    second noise level, stands for it in 1 − σ. Half-precision tensors are computed in float32, as published.

    Args:
        x_t: The state [B, ...] at σ.
        prediction: The flow v, of its shape.
        sigma: σ in (0, 1]: one number, or a tensor that broadcasts to x_t.
        sigma_next: σ' in [0, σ).
        noise_level: a ≥ 0; 0 is the ODE's step.
        sigma_max: The level below 1 that stands for σ = 1.
    """
    x_t, prediction = at_least_float32(x_t), at_least_float32(prediction)
    now, later, highest = (torch.as_tensor(level, dtype=torch.float64) for level in (sigma, sigma_next, sigma_max))
    step = later - now
    spread = noise_level * (now / (1 - torch.where(now >= 1, highest.to(now.device), now))).sqrt()
    drift = spread**2 / (2 * now)
    mean = x_t * (1 + drift * step).to(x_t) + prediction * ((1 + drift * (1 - now)) * step).to(x_t)
    return mean, (spread * (-step).sqrt()).to(x_t)


class FlowSampler:
    """`num_steps` steps: `t` [K] descending from 1, and `transition` as in `interfaces.Sampler`.

    `image_tokens` is the number of patches, for schedules that are shifted by it. `schedule`: other arguments of the
    scheduler's `set_timesteps`, such as `sigmas`; a `mu` among them is the shift.
    """

    noises = ("flow_sde", "cps", "ddim")

    def __init__(
        self,
        config: dict[str, Any],
        num_steps: int,
        device: torch.device,
        *,
        image_tokens: int,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        scheduler = flow_scheduler(config)
        options = dict(schedule or {"num_inference_steps": num_steps})
        if scheduler.config.use_dynamic_shifting and "mu" not in options:
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            options["mu"] = calculate_shift(image_tokens, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(**options)
        self.sigmas: Tensor = scheduler.sigmas
        """Noise levels [K + 1], float32 on the CPU, the last one 0."""
        # Of a model without data the noise levels are known all the same: terms choose among them.
        self.t = self.sigmas[:-1] if device.type == "meta" else self.sigmas[:-1].to(device)

    def transition(
        self, k: int, x_t: Tensor, prediction: Tensor, *, eta: float, noise: str = "ddim"
    ) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and standard deviation s (0-d) of step `k` with this form of noise, on x_t's device.

        `eta` is η of `ddim`, in [0, 1], and the noise level a of the others: above 0 of `flow_sde`, up to 1 of `cps`.
        0 is diffusers' Euler step, bit for bit. UserError outside these, where no such step exists.
        """
        if noise not in self.noises:
            raise unknown_name("noise", noise, "a form of noise of a flow", self.noises)
        if eta < 0 or (eta > 1 and noise != "flow_sde"):
            raise UserError(f"eta: {eta}; a flow's steps allow 0 (no noise) to 1 (ancestral sampling).")
        now, later = self.sigmas[k], self.sigmas[k + 1]
        if noise == "flow_sde" and eta > 0:
            return flow_sde_step(x_t, prediction, now, later, noise_level=eta, sigma_max=self.sigmas[1])
        mean = x_t + (later - now) * prediction
        std = self._std(k, eta, noise)
        if std > 0:
            kept = (later.double() ** 2 - std**2).clamp(min=0).sqrt()
            noise_end = x_t + (1 - now) * prediction
            mean = mean + (kept - later.double()).to(x_t) * noise_end
        return mean, std.to(x_t)

    def _std(self, k: int, eta: float, noise: str) -> Tensor:
        now, later = self.sigmas[k].double(), self.sigmas[k + 1].double()
        if noise == "cps":
            return later * math.sin(eta * math.pi / 2)
        forgotten = 1 - ((1 - now) * later / ((1 - later) * now)) ** 2
        return eta * later * forgotten.clamp(min=0).sqrt()
