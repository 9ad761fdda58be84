"""Steps of a flow x_t = (1 − t)·x0 + t·noise as Gaussian transitions: an SDE with the ODE's marginals (Flow-GRPO).

Flow-GRPO (arXiv 2505.05470, eq. 9) turns the sampling ODE into an SDE with noise σ_t = a·√(t / (1 − t)) and steps it by
Euler and Maruyama, which keeps the marginals only for small steps and is singular at t = 1. Here a step is DDIM's
(arXiv 2010.02502) for a flow: from the two ends that a prediction v implies, x̂0 = x_t − t·v and n̂ = x_t + (1 − t)·v,

    x_{t'} ~ N( (1 − t')·x̂0 + √(t'² − s²)·n̂, s² ),      s = η·t'·√(1 − ((1 − t)·t' / ((1 − t')·t))²),

so that for a known image x_{t'} has exactly the ODE's mean and variance, however large the step. For small steps it is
Flow-GRPO's SDE with a = √2·η (their a = 0.7 is η ≈ 0.5); η = 1 is ancestral sampling; the step to t' = 0 has s = 0.
"""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from agsm_rl.errors import UserError


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


class FlowSampler:
    """`num_steps` steps: `t` [K] descending from 1, and `transition` as in `interfaces.Sampler`.

    `image_tokens` is the number of patches, for schedules that are shifted by it.
    """

    def __init__(self, config: dict[str, Any], num_steps: int, device: torch.device, *, image_tokens: int) -> None:
        scheduler = flow_scheduler(config)
        options = {}
        if scheduler.config.use_dynamic_shifting:
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            options["mu"] = calculate_shift(image_tokens, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(num_steps, **options)
        self.sigmas: Tensor = scheduler.sigmas
        """Noise levels [K + 1], float32 on the CPU, the last one 0."""
        self.t = self.sigmas[:-1].to(device)

    def transition(self, k: int, x_t: Tensor, prediction: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and standard deviation s (0-d) of step `k`, both on x_t's device and of its dtype.

        `eta` in [0, 1] scales s; 0 is diffusers' Euler step, bit for bit. UserError above 1, where no such step exists.
        """
        if not 0 <= eta <= 1:
            raise UserError(f"eta: {eta}; a flow's steps allow 0 (no noise) to 1 (ancestral sampling).")
        now, later = self.sigmas[k], self.sigmas[k + 1]
        mean = x_t + (later - now) * prediction
        std = self._std(k, eta)
        if std > 0:
            kept = (later.double() ** 2 - std**2).clamp(min=0).sqrt()
            noise = x_t + (1 - now) * prediction
            mean = mean + (kept - later.double()).to(x_t) * noise
        return mean, std.to(x_t)

    def _std(self, k: int, eta: float) -> Tensor:
        now, later = self.sigmas[k].double(), self.sigmas[k + 1].double()
        forgotten = 1 - ((1 - now) * later / ((1 - later) * now)) ** 2
        return eta * later * forgotten.clamp(min=0).sqrt()
