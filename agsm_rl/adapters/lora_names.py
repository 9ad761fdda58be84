"""The names that LoRA files give to a pipeline's layers, in the forms that trainers and tools write.

| form | layers | weights |
|---|---|---|
| PEFT, diffusers | `unet.down_blocks.0.….to_q`, `base_model.model.down_blocks…`, … | `lora_A.weight`, `lora_B.weight` |
| diffusers, older | `….attn1.processor.to_q_lora`, `….q_proj.lora_linear_layer` | `down.weight`, `up.weight` |
| kohya, OneTrainer | `lora_unet_down_blocks_0_…`, `lora_te1_…` | `lora_down.weight`, `lora_up.weight`, `alpha` |
| ComfyUI | `diffusion_model.input_blocks.1.1.…` | either |

DoRA's lengths are `lora_magnitude_vector` in PEFT's form and `dora_scale` in kohya's. A name is looked up in the
model, not rewritten by rules: it fits one module of one part, or it is reported.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

Role = str
"""A tensor's role in its layer: down (A), up (B), alpha, or DoRA's magnitude or dora_scale."""
ROLES = (
    (re.compile(r"(.+)\.lora_A(?:\.[A-Za-z0-9]+)?\.weight"), "down"),
    (re.compile(r"(.+)\.lora_B(?:\.[A-Za-z0-9]+)?\.weight"), "up"),
    (re.compile(r"(.+)\.lora_down\.weight"), "down"),
    (re.compile(r"(.+)\.lora_up\.weight"), "up"),
    (re.compile(r"(.+?)(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight"), "down"),
    (re.compile(r"(.+?)(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight"), "up"),
    (re.compile(r"(.+)\.lora_magnitude_vector(?:\.[A-Za-z0-9]+)?(?:\.weight)?"), "magnitude"),
    (re.compile(r"(.+)\.dora_scale"), "dora_scale"),
    (re.compile(r"(.+)\.alpha"), "alpha"),
)
OTHER_METHODS = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "IA3": r"\.ia3_",
    "OFT": r"\.b?oft_",
    "VeRA": r"vera_lambda",
    "LoCon in Tucker's form": r"\.lora_mid\.",
    "differences of whole weights": r"\.diff(_b)?$",
    "embeddings": r"string_to_param|emb_params|\.lora_embedding_",
}
"""Adapters other than LoRA and DoRA, by the names of their tensors."""
PEFT_PREFIX = "base_model.model."
DOTTED_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""Prefixes of a denoiser's layers besides `unet.` and `transformer.`."""
UNDERSCORED = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_transformer_", "lora_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
PROCESSOR = re.compile(r"(.+)\.processor\.to_(q|k|v|out)")
OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def split_name(name: str) -> tuple[str, Role] | None:
    """The layer that a tensor belongs to, and its role there; None if it is not a LoRA's."""
    for pattern, role in ROLES:
        if named := pattern.fullmatch(name):
            return named[1], role
    return None


def method_of(name: str) -> str | None:
    """The known method other than LoRA that writes tensors with this name, if any."""
    return next((method for method, mark in OTHER_METHODS.items() if re.search(mark, name)), None)


class LayerNames:
    """Finds a pipeline's modules by the names that files give them.

    parts: the models by their names in the pipeline (`unet` or `transformer`, `text_encoder`, …).
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._aliases: dict[str, set[tuple[str, str]]] = {}
        for part, model in parts.items():
            for module in _layers(model):
                for alias in _aliases(part, model, module):
                    self._aliases.setdefault(alias, set()).add((part, module))
        self.examples = [f"{part}.{module}" for part, model in parts.items() for module in list(_layers(model))[:1]]

    def find(self, layer: str) -> tuple[str, str] | None:
        """(part, module) of a layer's name in a file; None if no module, or several parts' modules, have it."""
        fitting = self._aliases.get(modern_name(layer.removeprefix(PEFT_PREFIX)), set())
        return next(iter(fitting)) if len(fitting) == 1 else None


def modern_name(layer: str) -> str:
    """A layer's name, converted from the style of diffusers' former attention processors."""
    if named := PROCESSOR.fullmatch(layer):
        return f"{named[1]}.to_{named[2]}" + (".0" if named[2] == "out" else "")
    head, _, last = layer.rpartition(".")
    return f"{head}.{OLD_PROJECTIONS[last]}" if head.endswith(".self_attn") and last in OLD_PROJECTIONS else layer


def _layers(model: nn.Module) -> Iterator[str]:
    """The modules that a LoRA can change: linear layers (attention's projections first) and convolutions."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    yield from sorted(names, key=lambda name: not name.endswith(("to_q", "q_proj", ".q")))


def _aliases(part: str, model: Any, module: str) -> Iterator[str]:
    """All names that files use for a module."""
    names = [module]
    if part.startswith("text_encoder"):
        bare = module.removeprefix("text_model.")  # absent in transformers 5, present in files
        names = [bare, f"text_model.{bare}"]
    prefixes: tuple[str, ...] = (f"{part}.", "")
    if not part.startswith("text_encoder"):
        prefixes = (f"{part}.", *DOTTED_PREFIXES)
        names += [name for name in [_original_name(model, module)] if name is not None]
    for name in names:
        yield from (f"{prefix}{name}" for prefix in prefixes)
        yield from (f"{prefix}{name.replace('.', '_')}" for prefix in UNDERSCORED.get(part, ()))


def _original_name(unet: Any, module: str) -> str | None:
    """A U-Net's module as Stability's own code names it (`input_blocks.1.1.proj_in`); None for other models."""
    if module in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[module]
    block, _, rest = module.partition(".")
    per_block = unet.config.get("layers_per_block")
    if not isinstance(per_block, int):
        return None
    if block == "mid_block":
        kind, number, rest = _three(rest)
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}{_inner(kind, rest)}"
    if block not in ("down_blocks", "up_blocks"):
        return None
    number, kind, layer, rest = int(rest.partition(".")[0]), *_three(rest.partition(".")[2])
    if block == "down_blocks":
        position = 1 + number * (per_block + 1) + (per_block if kind == "downsamplers" else layer)
        place = 0 if kind != "attentions" else 1
        return f"input_blocks.{position}.{place}" + (".op" if kind == "downsamplers" else _inner(kind, rest))
    attends = getattr(unet.up_blocks[number], "has_cross_attention", False)
    position = number * (per_block + 1) + (per_block if kind == "upsamplers" else layer)
    place = {"resnets": 0, "attentions": 1}.get(kind, 2 if attends else 1)
    return f"output_blocks.{position}.{place}" + (".conv" if kind == "upsamplers" else _inner(kind, rest))


def _three(name: str) -> tuple[str, int, str]:
    kind, number, rest = (*name.split(".", 2), "")[:3]
    return kind, int(number), rest


def _inner(kind: str, rest: str) -> str:
    return f".{RESNET[rest]}" if kind == "resnets" else f".{rest}"
