"""DDPO's rewards that need no weights (arXiv 2305.13301, section 5.1): how small, or large, an image's JPEG file is."""

import io

import torch
from PIL import Image
from torch import Tensor

QUALITY = 95
"""As in DDPO's experiments."""


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """File sizes [B] in kB (1,000 bytes) of images [B, 3, H, W] in [0, 1], saved as JPEG of quality 95."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


class JpegCompressibility:
    """Minus the file size in kB [B] of images [B, 3, H, W] in [0, 1]; the prompts do not matter."""

    name = "jpeg_compressibility"
    range = (-float("inf"), 0.0)
    licence = "Apache-2.0 (no weights)"
    differentiable = False

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -jpeg_kilobytes(images)


class JpegIncompressibility:
    """The file size in kB [B] of images [B, 3, H, W] in [0, 1]; the prompts do not matter."""

    name = "jpeg_incompressibility"
    range = (0.0, float("inf"))
    licence = "Apache-2.0 (no weights)"
    differentiable = False

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return jpeg_kilobytes(images)
