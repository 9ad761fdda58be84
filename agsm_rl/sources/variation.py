"""What pairs and preferences draw anew each time that a row comes: no caption, a mirror image, a sample of latents."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Backbone
from agsm_rl.sources.cache import Kept
from agsm_rl.sources.latents import to_latents
from agsm_rl.training.randomness import Draw
from agsm_rl.training.sizes import Size, latent_shape_at

Latents = Literal["mode", "sample"]


class Variation:
    """The options of a source; UserError for one out of range, or that a cache cannot serve."""

    def __init__(self, *, caption_dropout: float, latents: Latents, horizontal_flip: bool, cache: Kept | None) -> None:
        if latents not in get_args(Latents):
            raise unknown_name("latents", latents, "a way to take an image's latents", get_args(Latents))
        if not 0 <= caption_dropout < 1:
            raise UserError(f"caption_dropout: got {caption_dropout}, but it must lie in [0, 1)")
        if cache and latents == "sample":
            raise UserError(
                "cache: keeps each image's mode, but `latents: sample` is new each time; leave one of them out"
            )
        if cache and horizontal_flip:
            raise UserError("cache: keeps no mirror images, which `horizontal_flip` needs; leave one of them out")
        if cache == "all" and caption_dropout:
            raise UserError("cache: all keeps no empty prompt, which `caption_dropout` needs; write `cache: latents`")
        self.caption_dropout, self.latents, self.horizontal_flip = caption_dropout, latents, horizontal_flip

    @property
    def is_fixed(self) -> bool:
        """Whether an image has the same latents each time."""
        return self.latents == "mode" and not self.horizontal_flip

    def captions(self, captions: list[str], draw: Draw, rows: Tensor) -> list[str]:
        """The captions of the rows with these numbers, some of them left out."""
        if not self.caption_dropout:
            return captions
        kept = draw.uniform(rows, purpose="caption dropout") >= self.caption_dropout
        return [caption if keep else "" for caption, keep in zip(captions, kept.tolist(), strict=True)]

    def encoded(
        self,
        pictures: Sequence[Image.Image | Tensor],
        backbone: Backbone,
        draw: Draw,
        rows: Tensor,
        *,
        which: str = "",
        size: Size | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] of the rows' pictures; `which` tells several pictures of a row apart.

        Pictures are cut to `size`, or to the backbone's own.
        """
        if self.horizontal_flip:
            flips = (draw.uniform(rows, purpose=f"flip{which}") < 0.5).tolist()
            pictures = [_mirrored(picture) if flip else picture for picture, flip in zip(pictures, flips, strict=True)]
        noise = None
        if self.latents == "sample":
            shape = backbone.latent_shape if size is None else latent_shape_at(backbone, size)
            like = torch.empty(len(rows), *shape, device=backbone.device)
            noise = draw.noise_like(like, rows, purpose=f"posterior{which}")
        return to_latents(pictures, backbone, noise=noise, size=size)


def _mirrored(picture: Image.Image | Tensor) -> Image.Image | Tensor:
    """Left and right exchanged; latents that a cache kept never come here."""
    assert isinstance(picture, Image.Image)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
