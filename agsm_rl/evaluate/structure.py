"""How much of a source image an edited one keeps: SSIM, and the likeness of DINO's features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from skimage.metrics import structural_similarity

from agsm_rl.errors import UserError
from agsm_rl.files import why_not_on_hub
from agsm_rl.sources.latents import fit
from agsm_rl.training.scoring import scoring_device


def like(source: Image.Image, edited: Image.Image) -> Image.Image:
    """The source's central square at the size of the edited image."""
    square = fit(source, edited.width)
    picture = Image.fromarray((square * 255).round().byte().permute(1, 2, 0).numpy())
    return picture if picture.size == edited.size else picture.resize(edited.size, Image.Resampling.BICUBIC)


def ssim(source: Image.Image, edited: Image.Image) -> float:
    """Structural similarity (Wang and others, 2004; scikit-image's defaults) of two images of one size, 1 if equal."""
    return float(structural_similarity(np.asarray(source), np.asarray(edited), channel_axis=2, data_range=255))


class Dino:
    """Cosine of two images' features, the class token of a DINO or DINOv2 from transformers: 1 if equal."""

    def __init__(self, model: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(model)
            self.model: Any = AutoModel.from_pretrained(model).eval().to(scoring_device())
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"dino: {why_not_on_hub(model)}; give a folder of a DINOv2, fetch facebook/dinov2-base, or leave it out"
            ) from error

    @torch.no_grad()
    def likeness(self, source: Image.Image, edited: Image.Image) -> float:
        """The cosine, in [-1, 1]."""
        pixels = self.processor([source, edited], return_tensors="pt").to(scoring_device())
        first, second = self.model(**pixels).last_hidden_state[:, 0].float()
        return float(torch.cosine_similarity(first, second, dim=0))
