"""From pictures to the latents that a backbone learns from."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agsm_rl.interfaces import Backbone


def to_latents(pictures: Sequence[Image.Image | Tensor], backbone: Backbone, *, noise: Tensor | None = None) -> Tensor:
    """Pictures encoded by the backbone, or the latents that a cache gave in their place. Float32 [B, C, h, w].

    With standard normal `noise` [B, C, h, w], samples of the VAE's posterior instead of its mean.
    """
    kept = [picture for picture in pictures if isinstance(picture, Tensor)]
    if kept:
        return torch.stack(kept).to(backbone.device).float()
    pixels = torch.stack([fit(picture, backbone.resolution) for picture in pictures if not isinstance(picture, Tensor)])
    if noise is None:
        return backbone.encode_images(pixels.to(backbone.device))
    return backbone.encode_images(pixels.to(backbone.device), noise=noise)


def fit(picture: Image.Image, resolution: int) -> Tensor:
    """The central square at `resolution` (bicubic, antialiased); float [3, R, R] in [0, 1]."""
    width, height = picture.size
    if (width, height) != (resolution, resolution):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # Enlarging the square alone: a strip of pixels enlarged as a whole would take gigabytes.
        square = (left, top, left + side, top + side)
        picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC, box=square)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
