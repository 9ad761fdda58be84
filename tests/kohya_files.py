"""A layer of a LoRA as kohya's trainer writes it."""

import torch

MID = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"


def kohya_layer(name, rank=2, **changes):
    down, up = torch.ones(rank, 2048), torch.ones(8, rank)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(4.0)} | changes
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
