"""How sharp an image is, by its Laplacian: a reward with gradients and without weights."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Sharpness:
    """How sharp an image is, whatever the prompt: the mean squared Laplacian (4 neighbours) of the grey image, [B] ≥ 0.

    Grey is the mean of the three channels; the outermost pixels, which lack neighbours, are left out.
    """

    name = "sharpness"
    range = (0.0, float("inf"))
    licence = "Apache-2.0 (no weights)"
    differentiable = True

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).to(images)
        laplacian = F.conv2d(images.mean(dim=1, keepdim=True), kernel[None, None])
        return (laplacian**2).mean(dim=(1, 2, 3))
