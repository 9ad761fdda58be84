"""From pictures to the latents that a backbone learns from."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agsm_rl.interfaces import Backbone
from agsm_rl.sources.buckets import box
from agsm_rl.training.sizes import Resolution, Size, size_of


def to_latents(
    pictures: Sequence[Image.Image | Tensor],
    backbone: Backbone,
    *,
    noise: Tensor | None = None,
    size: Size | None = None,
) -> Tensor:
    """Pictures encoded by the backbone, or the latents that a cache gave in their place. Float32 [B, C, h, w].

    Pictures are cut to `size`, or to the backbone's own. With standard normal `noise` [B, C, h, w], samples of the
    VAE's posterior instead of its mean.
    """
    kept = [picture for picture in pictures if isinstance(picture, Tensor)]
    if kept:
        return torch.stack(kept).to(backbone.device).float()
    size = size_of(backbone.resolution) if size is None else size
    pixels = torch.stack([fit(picture, size) for picture in pictures if not isinstance(picture, Tensor)])
    if noise is None:
        return backbone.encode_images(pixels.to(backbone.device))
    return backbone.encode_images(pixels.to(backbone.device), noise=noise)


def fit(picture: Image.Image, resolution: Resolution) -> Tensor:
    """The largest part from the centre that has the shape, at `resolution` (bicubic, antialiased); float [3, H, W]."""
    size = size_of(resolution)
    own = Size(picture.height, picture.width)
    if own != size:
        # Enlarging that part alone: a strip of pixels enlarged as a whole would take gigabytes.
        picture = picture.resize((size.width, size.height), Image.Resampling.BICUBIC, box=box(own, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
