"""SANA: a linear transformer, a deep-compression autoencoder and a Gemma-2."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

SIZE = 1.6


def make_tokenizer() -> GemmaTokenizer:
    """A few letters; whatever lies between two of them is one unknown token, so that the instruction is short."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {token: number for number, token in enumerate([*special, *"rdbqwkgzxjv"])}
    return GemmaTokenizer(vocab=vocabulary, merges=[])


def make() -> Any:
    """Three blocks, 32 wide; 32 x 32 images to 4 x 8 x 8 latents."""
    tokenizer = make_tokenizer()
    text = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(tokenizer, Gemma2Model(text), vae, transformer, scheduler)


def make_full_size() -> Any:
    """SANA 1.6B at 1024 pixels: the defaults of diffusers' and transformers' classes, the autoencoder's apart."""
    vae = AutoencoderDC(
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", *["EfficientViTBlock"] * 3),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", *["EfficientViTBlock"] * 3),
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    with torch.device("cpu"):  # which it moves its noise levels to
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(make_tokenizer(), Gemma2Model(Gemma2Config()), vae, SanaTransformer2DModel(), scheduler)
