"""What a transformer should see half-way: at each image token, the shape and the colour that are drawn there.

Representation alignment (REPA, arXiv 2410.06940) makes a diffusion transformer learn several times as fast by asking
its middle blocks for what a pretrained vision model sees at each place of the clean image. In a drawn world that is
known exactly.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from agsm_rl.shapes.look import Look, outlines
from agsm_rl.shapes.scenes import Scene

WEIGHT = 0.5
"""Of the cross-entropies beside the denoising error, as in REPA."""
FINE = 16
"""Pixels along a token's side when it is looked up which object covers it."""
LEAST_COVERED = 0.25
"""Share of a token that an object must cover to be what is drawn there."""


def drawn_at(scenes: list[Scene], look: Look, tokens: int) -> Tensor:
    """Shape and colour at each of `tokens` x `tokens` places, uint8 [N, 2, tokens²]; 0 is background."""
    side, found = tokens * FINE, []
    names = (list(look.shapes), list(look.colors))
    scale = side / look.image_size
    for scene in scenes:
        canvas = Image.new("L", (side, side), 0)
        pen = ImageDraw.Draw(canvas)
        for number, item in enumerate(scene.objects, start=1):
            for hole, corners in enumerate(outlines(item.shape, item.x * scale, item.y * scale, item.radius * scale)):
                pen.polygon(corners, fill=0 if hole else number)
        cells = np.asarray(canvas).reshape(tokens, FINE, tokens, FINE).swapaxes(1, 2).reshape(tokens**2, FINE**2)
        covered = np.stack([(cells == number).mean(1) for number in range(1, len(scene.objects) + 1)])
        which = np.where(covered.max(0) >= LEAST_COVERED, covered.argmax(0) + 1, 0)
        kinds = [(0, 0), *((names[0].index(x.shape) + 1, names[1].index(x.color) + 1) for x in scene.objects)]
        found.append(np.array(kinds, dtype=np.uint8)[which].T)
    return torch.from_numpy(np.stack(found))


class Representation(nn.Module):
    """Reads the image tokens after the middle block of an SD3 transformer; thrown away afterwards."""

    def __init__(self, denoiser: Any, look: Look, scenes: list[Scene]) -> None:
        super().__init__()
        width = denoiser.inner_dim
        self.drawn = drawn_at(scenes, look, denoiser.config.sample_size // denoiser.config.patch_size)
        self.sizes = [len(look.shapes) + 1, len(look.colors) + 1]
        self.read = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, sum(self.sizes)))
        middle = denoiser.transformer_blocks[len(denoiser.transformer_blocks) // 2 - 1]
        self.hook = middle.register_forward_hook(self._keep)
        self.tokens: Tensor | None = None

    def _keep(self, block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        self.tokens = output[1]

    def loss(self, chosen: np.ndarray) -> Tensor:
        """WEIGHT times the mean cross-entropy of shape and colour, after a prediction for the chosen scenes [B]."""
        assert self.tokens is not None
        drawn = self.drawn[torch.from_numpy(chosen)]
        told = self.read(self.tokens.float()).flatten(0, 1).split(self.sizes, dim=1)
        parts = [F.cross_entropy(part, drawn[:, index].long().flatten()) for index, part in enumerate(told)]
        return WEIGHT * (parts[0] + parts[1]) / 2

    def remove(self) -> None:
        """Take the hook off."""
        self.hook.remove()
