"""The weights, pixels and pictures behind the golden files: made by formulas, so that every machine has the same.

The official model classes, made small and filled with `weights`, gave the numbers in the golden files.
"""

import math

import numpy as np
import torch
from PIL import Image


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A tensor a key, of the given shape: a number of the key's place in sorted order and of the element's."""
    keys = sorted(key for key in shapes if not key.endswith("position_ids"))
    return {key: _tensor(place, key, shapes[key]) for place, key in enumerate(keys)}


def _tensor(place: int, key: str, shape: list[int]) -> torch.Tensor:
    count = math.prod(shape)
    waves = torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * 12.9898 + place * 78.233) * 43758.5453
    values = (torch.remainder(waves, 1.0) - 0.5) * 3.4641
    if len(shape) == 1:
        values = 0.2 * values + float(key.endswith("weight"))
    elif len(shape) > 1 and "embed" not in key:
        values = values * 1.5 / math.sqrt(count / shape[0])
    return values.reshape(shape).float()


def pixels(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """A batch of images as a model sees them, already normalised."""
    total = count * channels * height * width
    return torch.cos(torch.arange(total, dtype=torch.float64) * 0.11).float().reshape(count, channels, height, width)


def picture(width: int, height: int) -> Image.Image:
    """The picture that the `preprocess` entries, "WxH" → every 9001st value, were made of."""
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    red, green, blue = x * 7 + y * 3, x * x // 5 + y, x * y
    return Image.fromarray((np.stack([red, green, blue], axis=-1) % 256).astype(np.uint8))
