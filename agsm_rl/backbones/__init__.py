"""Backbones: frozen diffusers pipelines behind the one convention of `interfaces.Backbone`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from agsm_rl.backbones.options import Device, with_options
from agsm_rl.interfaces import Backbone

if TYPE_CHECKING:
    from agsm_rl.backbones.frozen_pipeline import FrozenPipeline
    from agsm_rl.backbones.stable_diffusion import StableDiffusion
    from agsm_rl.backbones.stable_diffusion_3 import StableDiffusion3

_HOMES = {
    "FrozenPipeline": "frozen_pipeline",
    "StableDiffusion": "stable_diffusion",
    "StableDiffusion3": "stable_diffusion_3",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a recipe is checked before diffusers is loaded, which takes seconds."""
    if name in _HOMES:
        return getattr(import_module(f"agsm_rl.backbones.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agsm_rl.backbones' has no attribute '{name}'")


def _classes() -> "dict[str, type[StableDiffusion] | type[StableDiffusion3]]":
    from agsm_rl.backbones.stable_diffusion import StableDiffusion
    from agsm_rl.backbones.stable_diffusion_3 import StableDiffusion3

    return {found.use: found for found in (StableDiffusion, StableDiffusion3)}


@with_options
def load_backbone(
    checkpoint: str,
    *,
    resolution: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    gradient_checkpointing: bool = False,
    device: Device | None = None,
    local_files_only: bool = False,
    unet: str | None = None,
    transformer: str | None = None,
    lora: str | None = None,
    config: str | None = None,
    t5_length: int | None = None,
    memory_format: Literal["channels_last"] | None = None,
    scheduler: Literal["ddim"] | None = None,
    compile: Literal["default", "reduce-overhead"] | None = None,
) -> Backbone:
    """Stable Diffusion 1.5 and SDXL; for a checkpoint of another supported kind, that kind's backbone.

    So a recipe changes its base by `checkpoint:` alone. A pipeline of an unsupported kind is refused (UserError).
    """
    from agsm_rl.backbones.loading import KINDS, find_kind

    found = _classes()[KINDS[find_kind(checkpoint, local_files_only=local_files_only)]]
    return found(
        checkpoint,
        resolution=resolution,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        device=device,
        local_files_only=local_files_only,
        unet=unet,
        transformer=transformer,
        lora=lora,
        config=config,
        t5_length=t5_length,
        memory_format=memory_format,
        scheduler=scheduler,
        compile=compile,
    )


def backbone_of(pipeline: Any, *, resolution: int | None = None, gradient_checkpointing: bool = False) -> Backbone:
    """The backbone of a loaded pipeline, by its class; UserError for a pipeline of an unsupported kind."""
    from agsm_rl.backbones.loading import unsupported

    for found in _classes().values():
        if type(pipeline).__name__ in found.wraps:
            return found.from_pipeline(pipeline, resolution=resolution, gradient_checkpointing=gradient_checkpointing)
    raise unsupported("pipeline", type(pipeline).__name__)


__all__ = ["FrozenPipeline", "StableDiffusion", "StableDiffusion3", "backbone_of", "load_backbone"]
