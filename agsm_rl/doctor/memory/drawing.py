"""The memory that drawing takes, rehearsed without data: for a run's prediction, and to choose a batch's size."""

from __future__ import annotations

import torch

from agsm_rl.doctor.memory.meta_device import META, Rehearsal
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone
from agsm_rl.recipe.build import build_backbone
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import Block
from agsm_rl.training.sampling import guided
from agsm_rl.training.sizes import Resolution, drawing_at

REHEARSED = (2, 4)
"""Numbers of pictures whose memory is predicted, for the part that grows with their number."""


def bytes_of_one(block: Block, parts: Parts, resolution: Resolution, guidance: float) -> float:
    """The bytes that each further picture takes at the peak of drawing; UserError where there is nothing to tell by."""
    if "device" not in block.options:
        raise UserError(f"backbone '{block.use}' takes no `device: meta`")
    options = block.options | {"device": "meta", "compile": None}
    with Rehearsal() as rehearsal:
        backbone = build_backbone(type(block).model_validate({"use": block.use, **options}), parts=parts)
        for count in REHEARSED:
            rehearsal.phase = str(count)
            rehearse_drawing(backbone, count, guidance, resolution, where="evaluate.resolution")
    fewer, more = (rehearsal.peaks[str(count)] for count in REHEARSED)
    return (more - fewer) / (REHEARSED[1] - REHEARSED[0])


@torch.no_grad()
def rehearse_drawing(
    backbone: Backbone, count: int, guidance: float, resolution: Resolution | None, *, where: str
) -> None:
    """One step of drawing so many pictures, and their decoding, with a backbone on the meta device."""
    with drawing_at(backbone, resolution, where=where):
        cond = backbone.encode_text([f"picture {index}" for index in range(count)])
        uncond = backbone.encode_text([""])
        x_t = torch.empty(count, *backbone.latent_shape, device=META)
        t = torch.empty(count, device=META)
        x_t = x_t - guided(backbone.predict, x_t, t, cond, uncond, guidance)
        backbone.decode(x_t)
