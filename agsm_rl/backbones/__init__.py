"""Backbones: frozen diffusers pipelines behind the one convention of `interfaces.Backbone`."""

from typing import Any

from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.interfaces import Backbone
from agsm_rl.registry import load


def load_backbone(checkpoint: str, *, use: str = "stable_diffusion", **options: Any) -> Backbone:
    """The backbone registered as `use` on a checkpoint; `options` are its constructor's."""
    return load("backbones", use, where="backbone.use")(checkpoint, **options)


def backbone_of(pipeline: Any) -> Backbone:
    """The backbone of a loaded pipeline, by its class; UserError for a pipeline of an unsupported kind."""
    return StableDiffusion.from_pipeline(pipeline)
