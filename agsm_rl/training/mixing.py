"""How image and noise make up a latent and a regression target, for any backbone: both are linear in the two."""

from typing import NamedTuple

import torch
from torch import Tensor

from agsm_rl.interfaces import Backbone


class Mix(NamedTuple):
    """How image and noise make up a latent (`signal`, `noise`) and the regression target, each [B, 1, 1, 1]."""

    signal: Tensor
    noise: Tensor
    target_signal: Tensor
    target_noise: Tensor


CLEAN = Mix(*torch.tensor([1.0, 0.0, 0.0, 1.0]).view(4, 1, 1, 1, 1))
"""An image without noise, below the first level of the inversion."""


def mix_at(backbone: Backbone, like: Tensor, t: Tensor) -> Mix:
    """The coefficients of `add_noise` and `target` at levels `t` [B], both of which are linear in image and noise."""
    one = torch.ones(len(t), 1, 1, 1, device=like.device, dtype=torch.float32)
    none = torch.zeros_like(one)
    return Mix(
        backbone.add_noise(one, none, t),
        backbone.add_noise(none, one, t),
        backbone.target(one, none, t),
        backbone.target(none, one, t),
    )


def x0_estimate(backbone: Backbone, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
    """The finished image's latents [B, C, h, w] that a prediction for `x_t` at levels `t` [B] stands for."""
    mix = mix_at(backbone, x_t, t)
    determinant = mix.signal * mix.target_noise - mix.noise * mix.target_signal
    x0: Tensor = (mix.target_noise * x_t.float() - mix.noise * prediction.float()) / determinant
    return x0.to(x_t)
