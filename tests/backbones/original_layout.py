"""A pipeline's weights under the names of the original single-file checkpoints, whose authors' code is not diffusers.

Written for the tests from the published files' key names; diffusers' `from_single_file` is what reads them back.
"""

import re
from typing import Any

import torch
from torch import Tensor

UNET = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
RESNET = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".conv_shortcut.": ".skip_connection.",
}
VAE = {
    ".conv_norm_out.": ".norm_out.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
    ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
    ".mid_block.attentions.0.to_": ".mid.attn_1.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
}
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
}
JOINT = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "joint_blocks.",
    ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
    ".norm1.linear.": ".x_block.adaLN_modulation.1.",
    ".ff_context.net.0.proj.": ".context_block.mlp.fc1.",
    ".ff_context.net.2.": ".context_block.mlp.fc2.",
    ".ff.net.0.proj.": ".x_block.mlp.fc1.",
    ".ff.net.2.": ".x_block.mlp.fc2.",
    ".attn.to_out.0.": ".x_block.attn.proj.",
    ".attn.to_add_out.": ".context_block.attn.proj.",
    ".attn.norm_added_": ".context_block.attn.ln_",
    ".attn.norm_": ".x_block.attn.ln_",
    ".attn2.to_out.0.": ".x_block.attn2.proj.",
    ".attn2.norm_": ".x_block.attn2.ln_",
}


def in_original_layout(pipeline: Any) -> dict[str, Tensor]:
    """The tensors of an SD1.5, SDXL or SD3 pipeline as the authors' own files have them."""
    found = _prefixed("first_stage_model.", _vae(pipeline.vae))
    if hasattr(pipeline, "transformer"):
        found |= _prefixed("model.diffusion_model.", _joint(pipeline.transformer))
        for name, part in {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}.items():
            found |= _prefixed(f"text_encoders.{name}.transformer.", getattr(pipeline, part).state_dict())
        # Of this CLIP the file has no projection: it is the identity.
        del found["text_encoders.clip_l.transformer.text_projection.weight"]
    else:
        found |= _prefixed("model.diffusion_model.", _unet(pipeline.unet))
        if hasattr(pipeline, "text_encoder_2"):
            found |= _prefixed("conditioner.embedders.0.transformer.text_model.", _clip(pipeline.text_encoder))
            found |= _prefixed("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2))
        else:
            found |= _prefixed("cond_stage_model.transformer.text_model.", _clip(pipeline.text_encoder))
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for theirs, original in names.items():
        name = name.replace(theirs, original)
    return name


def _clip(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


def _unet(unet: Any) -> dict[str, Tensor]:
    """Blocks are counted through: a block's layers, each with its attention, then what resamples."""
    deep = unet.config.layers_per_block
    attends = [hasattr(block, "attentions") for block in unet.up_blocks]

    def place(match: re.Match[str]) -> str:
        direction, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (deep + 1)}.0.op."
        if kind == "upsamplers":
            return f"output_blocks.{block * (deep + 1) + deep}.{2 if attends[block] else 1}.conv."
        number = 1 + block * (deep + 1) + layer if direction == "down" else block * (deep + 1) + layer
        return f"{'input' if direction == 'down' else 'output'}_blocks.{number}.{1 if kind == 'attentions' else 0}."

    found = {}
    for name, tensor in unet.state_dict().items():
        inner = _renamed(name, RESNET) if ".resnets." in name else name
        inner = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(conv\.(?=\w+$))?", place, inner)
        for theirs, original in UNET.items():
            inner = original + inner.removeprefix(theirs) if inner.startswith(theirs) else inner
        found[inner] = tensor
    return found


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1
    found = {}
    for name, tensor in vae.state_dict().items():
        inner = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", name)
        inner = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{last - int(match[1])}.", inner)
        inner = _renamed(inner.replace(".resnets.", ".block.") if "mid_block" not in inner else inner, VAE)
        # Attention is a convolution of one pixel there.
        found[inner] = tensor[:, :, None, None] if "attn_1" in inner and tensor.ndim == 2 else tensor
    return found


def _open_clip(model: Any) -> dict[str, Tensor]:
    tensors = _clip(model)
    found = {"text_projection": tensors.pop("text_projection.weight").T}
    for name in [name for name in tensors if ".q_proj." in name]:
        parts = [tensors.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        merged = re.sub(r"q_proj\.(\w+)$", r"in_proj_\1", name)
        found[_renamed(merged, OPEN_CLIP)] = torch.cat(parts)
    return found | {_renamed(name, OPEN_CLIP): tensor for name, tensor in tensors.items()}


def _joint(transformer: Any) -> dict[str, Tensor]:
    tensors = dict(transformer.state_dict())
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.norm1_context."
    found = {}
    sides = {
        ".attn.to_{}.": ".x_block.attn",
        ".attn.add_{}_proj.": ".context_block.attn",
        ".attn2.to_{}.": ".x_block.attn2",
    }
    for theirs, original in sides.items():
        for name in [name for name in tensors if theirs.format("q") in name]:
            parts = [tensors.pop(name.replace(theirs.format("q"), theirs.format(part))) for part in "qkv"]
            merged = name.replace(theirs.format("q"), f"{original}.qkv.")
            found[_renamed(merged, JOINT)] = torch.cat(parts)
    for name, tensor in tensors.items():
        # Scale and shift stand the other way round in what modulates last.
        swapped = name.startswith((last, "norm_out."))
        found[_renamed(name, JOINT)] = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
    return found
