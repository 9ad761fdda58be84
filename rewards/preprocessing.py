"""From images to a network's input: each model's own resizing, exactly (from PIL pictures) or with gradients.

The exact way goes through pictures of 8 bits per channel, as the official packages do when they score files. The tensor
way does the same arithmetic in floating point (bicubic, antialiased), so that gradients reach every pixel.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, which all of these models use."""


class Preprocessing(Protocol):
    """A model's two ways to prepare images; both return normalised pixels [B, 3, size, size]."""

    def exact(self, pictures: Sequence[Image.Image]) -> Tensor:
        """From pictures of any size and mode, on the CPU."""
        ...

    def tensor(self, images: Tensor) -> Tensor:
        """From images [B, 3, H, W] in [0, 1], on their device, with gradients."""
        ...


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], minus CLIP's mean and divided by its standard deviation, channel by channel."""
    mean, std = (torch.tensor(values).to(pixels)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def pictures(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [0, 1] as PIL images of 8 bits per channel."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic and antialiased, as PIL resizes; images [B, 3, H, W]."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


class Letterbox:
    """HPSv2's: the longest side to `size`, centred on black, before normalising.

    The official code resizes floating-point tensors here, so both ways share it; the exact one starts from 8 bits.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def exact(self, pictures: Sequence[Image.Image]) -> Tensor:
        """From pictures."""
        return torch.cat([self.tensor(to_tensor(picture)[None]) for picture in pictures])

    def tensor(self, images: Tensor) -> Tensor:
        """From images [B, 3, H, W] in [0, 1]."""
        scale = self.size / max(images.shape[-2:])
        height, width = (round(side * scale) for side in images.shape[-2:])
        top, left = (self.size - height) // 2, (self.size - width) // 2
        around = (left, self.size - width - left, top, self.size - height - top)
        return normalised(F.pad(resized(images, height, width), around))


class ShortestSideCrop:
    """The shortest side to `size`, then the middle square.

    With `processor`, as transformers' image processors do it (RGB first; an odd pixel is cut off at the top and left),
    the reference for PickScore and today's CLIPScore. Without, as OpenAI's CLIP does it (RGB after resizing; halves are
    rounded to even), the reference for ImageReward and the aesthetic predictor. At some sizes the two differ by one
    pixel.
    """

    def __init__(self, size: int, *, processor: bool) -> None:
        self.size, self.processor = size, processor

    def exact(self, pictures: Sequence[Image.Image]) -> Tensor:
        """From pictures."""
        return torch.stack([normalised(to_tensor(self._crop(picture))) for picture in pictures])

    def tensor(self, images: Tensor) -> Tensor:
        """From images [B, 3, H, W] in [0, 1]; clipped where bicubic overshoots, as PIL does."""
        height, width = self._sides(*images.shape[-2:])
        images = resized(images, height, width).clamp(0, 1)
        top, left = self._start(height), self._start(width)
        return normalised(images[..., top : top + self.size, left : left + self.size])

    def _crop(self, picture: Image.Image) -> Image.Image:
        picture = picture.convert("RGB") if self.processor else picture
        height, width = self._sides(picture.height, picture.width)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        top, left = self._start(height), self._start(width)
        return picture.crop((left, top, left + self.size, top + self.size))

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        shortest = min(height, width)
        # The same order of operations as the originals: int() would cut 299.99… to 299.
        return int(self.size * height / shortest), int(self.size * width / shortest)

    def _start(self, side: int) -> int:
        return (side - self.size) // 2 if self.processor else round((side - self.size) / 2)
