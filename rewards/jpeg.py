"""DDPO's two rewards without weights (arXiv 2305.13301, section 5.1): how small, or how large, an image's JPEG is."""

import io

import torch
from agsm_rl_rewards.preprocessing import pictures
from torch import Tensor

QUALITY = 95
"""As in DDPO's experiments."""


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """File sizes [B] in kB (1,000 bytes) of images [B, 3, H, W] in [0, 1], saved as JPEG of quality 95."""
    sizes = []
    for picture in pictures(images):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


class JpegCompressibility:
    """How small an image's JPEG is, whatever the prompt: minus its file size in kB, [B]."""

    name = "jpeg_compressibility"
    range = (-float("inf"), 0.0)
    licence = "Apache-2.0 (no weights)"
    differentiable = False

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        return -jpeg_kilobytes(images)


class JpegIncompressibility:
    """How large an image's JPEG is, whatever the prompt: its file size in kB, [B]."""

    name = "jpeg_incompressibility"
    range = (0.0, float("inf"))
    licence = "Apache-2.0 (no weights)"
    differentiable = False

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        return jpeg_kilobytes(images)
