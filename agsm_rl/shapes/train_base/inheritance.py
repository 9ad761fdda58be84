"""A denoiser that begins with another base's weights: a U-Net that reads another text, a transformer with finer tokens.

A small SDXL that is trained from nothing takes longer than shapes-sd15 to heed what single words say of a caption's
reliability (docs/experiments.md). What a teacher knows of drawing does not depend on who reads it the prompt.
"""

from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from torch import Tensor

from agsm_rl.errors import UserError
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


@torch.no_grad()
def begin_finer(coarse: SD3Transformer2DModel, fine: SD3Transformer2DModel) -> None:
    """Give a transformer with a token per latent the weights of one with a token per patch, which is as wide and deep.

    A fine token begins as a patch would whose latents all are like its own, at its own place within the patch.
    UserError for one of another width or depth.
    """
    sizes = [f"{one.inner_dim} wide and {len(one.transformer_blocks)} blocks deep" for one in (coarse, fine)]
    if sizes[0] != sizes[1]:
        raise UserError(f"--coarser: its transformer is {sizes[0]}, and the one to be trained {sizes[1]}")
    patch, own = coarse.config.patch_size, fine.state_dict()
    for name, value in coarse.state_dict().items():
        if name == "pos_embed.proj.weight":
            value = value.sum(dim=(2, 3), keepdim=True)
        elif name.startswith("proj_out."):
            value = value.unflatten(0, (patch**2, -1)).mean(0)
        elif name == "pos_embed.pos_embed":
            value = _places_between(coarse.config, fine.config)
        own[name] = value
    fine.load_state_dict(own)


def _places_between(coarse: Any, fine: Any) -> Tensor:
    """The sine and cosine embeddings, [1, size², width], of the places of fine tokens among the coarse ones."""
    patch, size = coarse.patch_size, fine.pos_embed_max_size
    base = coarse.sample_size // patch
    first = (coarse.pos_embed_max_size - base) // 2  # the middle is cropped, as PatchEmbed does
    begin = (size - fine.sample_size) // 2
    places = (first + (torch.arange(size) - begin + 0.5) / patch - 0.5) * base / coarse.pos_embed_max_size
    width = coarse.num_attention_heads * coarse.attention_head_dim
    across, down = torch.meshgrid(places, places, indexing="xy")
    embedded = get_2d_sincos_pos_embed_from_grid(width, torch.stack([across, down]), output_type="pt")
    return embedded[None].float()
