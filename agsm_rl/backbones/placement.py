"""Which of a pipeline's parts wait on the CPU, and how its autoencoder works: `text`, `cpu_offload`, `vae_slicing`, …

While the denoiser works, the parts in `waiting_parts` are not on its device; they come there for their own work. The
denoiser itself always stays: it is trained through, so its weights are needed until the end of the backward pass.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from torch import nn

from agsm_rl.backbones.cond_texts import CondTexts
from agsm_rl.backbones.loading import find_checkpoint
from agsm_rl.backbones.options import Options
from agsm_rl.backbones.parts import load_parts, only_variant
from agsm_rl.backbones.pipeline_texts import PipelineTexts
from agsm_rl.backbones.residency import TextEncoders, rests_on_cpu, works_on
from agsm_rl.backbones.text_cache import TextCache
from agsm_rl.backbones.text_store import FORMAT, TextStore
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.sources.cache_folder import cache_folder

TextPlace = Literal["load", "offload", "cache"]
"""Where text encoders are while they are not in use."""
MODEL = "model"
"""diffusers' enable_model_cpu_offload."""


def place_of_text(options: Options) -> TextPlace:
    """Where the text encoders are: `load`, `offload` or `cache`; UserError for anything else."""
    if options.cpu_offload not in (None, MODEL):
        raise UserError(
            f"backbone.cpu_offload: got {options.cpu_offload!r}; allowed: {MODEL}, or leave it out. The denoiser is "
            "trained through, so it cannot be offloaded layer by layer; to save more memory, add `text: {keep: "
            "cache}`, gradient_checkpointing, or a smaller dtype."
        )
    place: Any = (options.text or {}).get("keep", "load")
    if place not in get_args(TextPlace):
        raise unknown_name("backbone.text.keep", str(place), "a place", get_args(TextPlace))
    return "offload" if place == "load" and options.cpu_offload else place


def waiting_parts(pipeline: Any, options: Options) -> frozenset[str]:
    """Names of the parts that are not on the device while the denoiser works."""
    names = _text_parts(pipeline) if place_of_text(options) != "load" else set()
    return frozenset(names | ({"vae"} if options.cpu_offload else set()))


def move(pipeline: Any, device: str | torch.device, waiting: Collection[str]) -> Any:
    """Move the parts that work to the device, and leave those that wait."""
    if not waiting:
        return pipeline.to(device)
    device = torch.empty(0, device=device).device  # with its number
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in waiting:
            part.to(device)
    works_on(pipeline, device)
    return pipeline


def settle(backbone: Any, options: Options, load: Callable[[], Any]) -> None:
    """Have the parts of a loaded FrozenPipeline wait, and its autoencoder work, as the options say.

    `load` loads the whole pipeline again, on the CPU.
    """
    _set_up_vae(backbone, options)
    place = place_of_text(options)
    parts = {name: getattr(backbone.pipeline, name) for name in sorted(_text_parts(backbone.pipeline))}
    if place == "load" or not parts or backbone.device.type == "meta":
        return
    identity, store = "", TextStore(None)
    if place == "cache":
        identity = backbone.identity("text")
        store = TextStore(cache_folder() / f"prompts-{identity}-{FORMAT}")
        store.describe({"kind": "prompts", "backbone": backbone.name, "of": options.checkpoint, "encoders": identity})
    encoders = TextEncoders(parts, backbone.device, lambda: _loaded_again(options, [*parts], load))
    backbone.text_cache = TextCache(encoders, store, identity=identity, frees=place == "cache")
    PipelineTexts(backbone.text_cache, backbone.pipeline)
    CondTexts(backbone.text_cache, backbone)


def _text_parts(pipeline: Any) -> set[str]:
    parts = pipeline.components.items()
    return {name for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)}


def _loaded_again(options: Options, names: list[str], load: Callable[[], Any]) -> dict[str, nn.Module]:
    """The text encoders alone where the checkpoint has files for each part; else those of the whole pipeline."""
    source = find_checkpoint(options.checkpoint)
    if Path(source).is_file() or options.lora is not None or options.quantize is not None:
        pipeline = load()
        return {name: getattr(pipeline, name) for name in names}
    where = {"local_files_only": options.local_files_only}
    others = {name: None for name in DiffusionPipeline.load_config(source, **where) if name not in names}
    dtype = getattr(torch, options.dtype)
    variant = only_variant(Path(source) / names[0])
    return load_parts(source, others, {"dtype": dtype, **where}, variant=variant, empty=False)


def _set_up_vae(backbone: Any, options: Options) -> None:
    switches = {"vae_slicing": "enable_slicing", "vae_tiling": "enable_tiling"}
    asked = [name for name in switches if getattr(options, name)]
    if not asked and not options.cpu_offload:
        return
    vaes = {id(vae): vae for vae in (backbone.pipeline.vae, backbone._vae)}.values()
    for vae in vaes:
        for name in asked:
            if not hasattr(vae, switches[name]):
                raise UserError(
                    f"backbone.{name}: diffusers has no such switch for a {type(vae).__name__}; leave it out, and "
                    "draw fewer images at once."
                )
            getattr(vae, switches[name])()
        if options.cpu_offload and backbone.device.type != "meta":
            rests_on_cpu(vae, backbone.device)
