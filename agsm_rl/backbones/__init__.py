"""Backbones: frozen diffusers pipelines behind the one convention of `interfaces.Backbone`.

Each kind declares itself in a file of its own and a line of registry.py; kinds.py finds the one that a checkpoint is.
"""

from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

from agsm_rl.backbones.options import Options
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone
from agsm_rl.source_code import own_options, takes
from agsm_rl.training.sizes import Resolution

if TYPE_CHECKING:
    from agsm_rl.backbones.flow_pipeline import FlowPipeline
    from agsm_rl.backbones.frozen_pipeline import FrozenPipeline
    from agsm_rl.backbones.stable_diffusion import StableDiffusion
    from agsm_rl.backbones.stable_diffusion_3 import StableDiffusion3

_HOMES = {"FrozenPipeline": "frozen_pipeline", "FlowPipeline": "flow_pipeline"} | {
    "StableDiffusion": "stable_diffusion",
    "StableDiffusion3": "stable_diffusion_3",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a recipe is checked before diffusers is loaded, which takes seconds."""
    if name in _HOMES:
        return getattr(import_module(f"agsm_rl.backbones.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agsm_rl.backbones' has no attribute '{name}'")


@takes(Options, every="backbones")
def load_backbone(checkpoint: str, **options: Any) -> Backbone:
    """The backbone of a checkpoint, of whatever kind it is; `stable_diffusion` does the same, and is the older name.

    So a recipe changes its base by `checkpoint:` alone. A pipeline of an unsupported kind is refused (UserError), and
    so is an option of another kind than the checkpoint's, unless it is null.
    """
    from agsm_rl.backbones import kinds
    from agsm_rl.backbones.loading import find_kind

    found = find_kind(checkpoint, local_files_only=options.get("local_files_only", False))
    kind: Any = kinds.kind_of(found)
    assert kind is not None  # find_kind says so
    taken = signature(kind).parameters
    foreign = {name for name in own_options("backbones") if name not in taken}
    for name in sorted(foreign & options.keys()):
        if options.pop(name) is not None:
            raise UserError(f"backbone.{name}: a {found} has no such option; leave it out.")
    backbone: Backbone = kind(checkpoint, **options)
    return backbone


def backbone_of(
    pipeline: Any, *, resolution: Resolution | None = None, gradient_checkpointing: bool = False
) -> Backbone:
    """The backbone of a loaded pipeline, by its class; UserError for a pipeline of an unsupported kind."""
    from agsm_rl.backbones import kinds
    from agsm_rl.backbones.loading import unsupported

    kind: Any = kinds.kind_of(type(pipeline).__name__)
    if kind is None:
        raise unsupported("pipeline", type(pipeline).__name__)
    backbone: Backbone = kind.from_pipeline(
        pipeline, resolution=resolution, gradient_checkpointing=gradient_checkpointing
    )
    return backbone


__all__ = ["FlowPipeline", "FrozenPipeline", "StableDiffusion", "StableDiffusion3", "backbone_of", "load_backbone"]
