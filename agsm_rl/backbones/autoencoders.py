"""Kinds of autoencoders: how pixels in [-1, 1] become latents, and how latents are scaled for the denoiser.

A backbone declares its kind as `autoencoder`. Callers see latents [B, C, h, w] whatever the autoencoder's own form is.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agsm_rl.backbones.model_index import BadPart


class Posterior(NamedTuple):
    """What an autoencoder says of images: `mode` and `mean` [B, C, h, w], and `std` of that shape; None: no noise."""

    mode: Tensor
    mean: Tensor
    std: Tensor | None

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise; the mode where there is no noise."""
        return self.mode if self.std is None else self.mean + self.std * noise.to(self.mean)


class Autoencoder:
    """The usual kind: a Gaussian posterior, and one scaling factor and one shift for all channels."""

    def channels(self, config: Any) -> int:
        """C of its latents."""
        return int(config.latent_channels)

    def check(self, config: Any) -> None:
        """BadPart where the configuration's scale is no usable number: every picture would be noise."""
        check_scale(config)
        if config.get("latents_mean") is not None:
            raise BadPart("its VAE normalises latents by latents_mean, which this kind of model does not have.")

    def encode(self, vae: Any, pixels: Tensor) -> Posterior:
        """Pixels [B, 3, H, W] in [-1, 1], of the VAE's dtype → its latents as they are."""
        posterior = vae.encode(pixels).latent_dist
        return Posterior(posterior.mode(), posterior.mean, posterior.std)

    def scale(self, latents: Tensor, vae: Any) -> Tensor:
        """Latents as the autoencoder has them → as the denoiser wants them."""
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def unscale(self, latents: Tensor, vae: Any) -> Tensor:
        """The inverse of `scale`."""
        return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents as the autoencoder has them, of its dtype → pixels in about [-1, 1]."""
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels


class NoPosterior(Autoencoder):
    """Without a posterior and a shift: SANA's deep-compression autoencoder (arXiv 2410.10733)."""

    def encode(self, vae: Any, pixels: Tensor) -> Posterior:
        """The latents, which have no noise."""
        latents = vae.encode(pixels, return_dict=False)[0]
        return Posterior(latents, latents, None)

    def scale(self, latents: Tensor, vae: Any) -> Tensor:
        """By the factor alone."""
        return latents * vae.config.scaling_factor

    def unscale(self, latents: Tensor, vae: Any) -> Tensor:
        """By the factor alone."""
        return latents / vae.config.scaling_factor


class Standardised(Autoencoder):
    """Latents less their mean, over their spread, channel by channel; each kind says where those stand."""

    def scale(self, latents: Tensor, vae: Any) -> Tensor:
        """(latents − mean) / std."""
        mean, std = self._statistics(latents, vae)
        return (latents - mean) / std

    def unscale(self, latents: Tensor, vae: Any) -> Tensor:
        """latents · std + mean."""
        mean, std = self._statistics(latents, vae)
        return latents * std + mean

    def _statistics(self, latents: Tensor, vae: Any) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation [1, C, 1, 1], of the latents' dtype and on their device."""
        raise NotImplementedError


class ChannelStatistics(Standardised):
    """Normalised channel by channel by `latents_mean` and `latents_std`; `frames`: of videos [B, C, T, h, w], T = 1."""

    def __init__(self, *, channels: str = "latent_channels", frames: bool = False) -> None:
        self._channels, self._frames = channels, frames

    def channels(self, config: Any) -> int:
        """C of its latents."""
        return int(config[self._channels])

    def check(self, config: Any) -> None:
        """BadPart unless there are a mean and a positive spread for each channel."""
        for name in ("latents_mean", "latents_std"):
            values = config.get(name)
            usable = isinstance(values, list | tuple) and len(values) == self.channels(config)
            if not usable or not all(is_finite(value) and (name == "latents_mean" or value > 0) for value in values):
                raise BadPart(f"its vae's config.json has {name} {values!r:.80}; it must be a number for each channel.")

    def encode(self, vae: Any, pixels: Tensor) -> Posterior:
        """The posterior of the only frame."""
        posterior = super().encode(vae, pixels[:, :, None] if self._frames else pixels)
        return Posterior(*(part[:, :, 0] for part in posterior if part is not None)) if self._frames else posterior

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Of the only frame."""
        pixels = super().decode(vae, latents[:, :, None] if self._frames else latents)
        return pixels[:, :, 0] if self._frames else pixels

    def _statistics(self, latents: Tensor, vae: Any) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
        return mean.view(1, -1, 1, 1).to(latents), std.view(1, -1, 1, 1).to(latents)


def check_scale(config: Any) -> None:
    """BadPart for a scaling factor or a shift that is not a usable number."""
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    if not is_finite(scale) or scale <= 0:
        raise BadPart(f"its vae's config.json has scaling_factor {scale!r:.80}; it must be a finite number above 0.")
    if shift is not None and not is_finite(shift):
        raise BadPart(f"its vae's config.json has shift_factor {shift!r:.80}; it must be a finite number or null.")


def is_finite(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
