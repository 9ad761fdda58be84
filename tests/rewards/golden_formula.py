"""The weights, pixels and pictures behind the golden files, by formulas: no random generator, the same on any version.

How the golden files came to be: the official model classes of image-reward 1.5 and hpsv2 1.2.0, built small, were given
`weights` and run once on `pixels`; their own preprocessing was run on `picture`. What came out is stored.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A tensor for each official name but the numbered positions; each depends on its place in the sorted names."""
    names = sorted(name for name in shapes if not name.endswith("position_ids"))
    return {name: _weight(name, shapes[name], place) for place, name in enumerate(names)}


def _weight(name: str, shape: list[int], place: int) -> Tensor:
    count = math.prod(shape)
    large = torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * 12.9898 + place * 78.233) * 43758.5453
    values = (large.frac() + (large < 0) - 0.5) * 3.4641  # about uniform, of unit variance
    if len(shape) >= 2 and "embed" not in name:
        values = values * (1.5 / math.sqrt(count / shape[0]))
    if len(shape) == 1:
        values = values * 0.2 + float(name.endswith("weight"))
    return values.reshape(shape).float()


def pixels(*shape: int) -> Tensor:
    """Normalised pixels [B, 3, H, W]."""
    return torch.cos(torch.arange(math.prod(shape), dtype=torch.float64) * 0.11).reshape(shape).float()


def picture(width: int, height: int) -> Image.Image:
    """Stripes and noise, as hard to resize as can be."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 7 + y * 3, x * x // 5 + y, x * y]
    return Image.fromarray(np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8))
