"""A U-Net that begins with another base's weights, though it reads another text.

A small SDXL that is trained from nothing takes longer than shapes-sd15 to heed what single words say of a caption's
reliability (docs/experiments.md). What a teacher knows of drawing does not depend on who reads it the prompt.
"""

import numpy as np
import torch
from torch import Tensor

from agsm_rl.interfaces import Backbone
from agsm_rl.shapes.scenes import Requirement
from agsm_rl.shapes.world import web_caption

CAPTIONS = 3_000
"""Captions, of 20 tokens each, that the map from one text to the other is fitted on."""
TEXT_LAYERS = ("attn2.to_k.weight", "attn2.to_v.weight")


@torch.no_grad()
def begin_as(teacher: Backbone, student: Backbone, requirements: list[Requirement]) -> float:
    """Give the student's U-Net the teacher's weights; R² of the text map that comes between, which is linear.

    Both must have the same blocks. The student's keys and values become the teacher's, of the text that least squares
    make of the student's own, token by token; what the teacher does not have (SDXL's pooled embedding and time ids)
    begins without effect.
    """
    rng = np.random.default_rng(5)
    captions = [web_caption(requirement, rng) for requirement in requirements]
    read, meant = _states(student, captions), _states(teacher, captions)
    text_map = torch.linalg.lstsq(read, meant).solution
    left = (read @ text_map - meant).square().sum() / (meant - meant.mean(0)).square().sum()
    own = student.denoiser.state_dict()
    for name, value in teacher.denoiser.state_dict().items():
        if name.endswith(TEXT_LAYERS):
            value = value @ text_map.T.to(value.dtype)
        own[name] = value.reshape(own[name].shape)  # a 1 x 1 convolution there may be a linear layer here
    for name in own:
        if name.startswith("add_embedding.linear_2."):
            own[name] = torch.zeros_like(own[name])
    student.denoiser.load_state_dict(own)
    return 1 - float(left)


def _states(backbone: Backbone, captions: list[str]) -> Tensor:
    """Text states of all tokens, [N·S, D], in double precision."""
    parts = [backbone.encode_text(captions[first : first + 200]).embeds for first in range(0, len(captions), 200)]
    return torch.cat(parts).flatten(0, 1).double()
