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
    """Pictures encoded by the backbone, or the latents that are there in their place. Float32 [B, C, h, w].

    Pictures are cut to `size`, or to the backbone's own. With standard normal `noise` [B, C, h, w], samples of the
    VAE's posterior instead of its mean.
    """
    kept = {row: picture for row, picture in enumerate(pictures) if isinstance(picture, Tensor)}
    if len(kept) == len(pictures):
        return torch.stack([*kept.values()]).to(backbone.device).float()
    size = size_of(backbone.resolution) if size is None else size
    fitted = [fit(picture, size) for picture in pictures if not isinstance(picture, Tensor)]
    # As many as without latents: an encoder may round batches of another size otherwise.
    pixels = torch.stack([*fitted, *fitted[:1] * len(kept)]).to(backbone.device)
    # In one layout, as kept ones are: what is computed of them may be rounded otherwise in another.
    if noise is not None:
        return backbone.encode_images(pixels, noise=noise).contiguous()
    encoded = backbone.encode_images(pixels).contiguous()
    if not kept:
        return encoded
    rest = iter(encoded)
    return torch.stack([kept[row].to(pixels) if row in kept else next(rest) for row in range(len(pictures))])


def fit(picture: Image.Image, resolution: Resolution) -> Tensor:
    """The largest part from the centre that has the shape, at `resolution` (bicubic, antialiased); float [3, H, W]."""
    return torch.from_numpy(np.array(resized(picture, size_of(resolution)))).permute(2, 0, 1).float() / 255


def resized(picture: Image.Image, size: Size) -> Image.Image:
    """The largest part from the centre that has the shape, at that size (bicubic, antialiased)."""
    own = Size(picture.height, picture.width)
    if own == size:
        return picture
    # Enlarging that part alone: a strip of pixels enlarged as a whole would take gigabytes.
    return picture.resize((size.width, size.height), Image.Resampling.BICUBIC, box=box(own, size))
