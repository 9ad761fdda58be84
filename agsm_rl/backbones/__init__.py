"""Backbones: frozen diffusers pipelines behind the one convention of `interfaces.Backbone`."""

from typing import Any

from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.interfaces import Backbone


def backbone_of(pipeline: Any) -> Backbone:
    """The backbone of a loaded pipeline, by its class; UserError for a pipeline of an unsupported kind."""
    return StableDiffusion.from_pipeline(pipeline)
