"""FLUX.2 [klein]: double- and single-stream blocks, a VAE with batch-norm statistics and a Qwen3."""

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tiny_qwen import CHAT, qwen3_4b
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

SIZE = 3.88
OPTIONS = {"text_length": 96}
"""The chat around a prompt takes 62 tokens."""
KLEIN_BASE_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
"""The transformer's published sizes, as in DiffSynth-Studio (diffsynth/configs/model_configs.py) and in Black Forest
Labs' Klein4BParams. What is not named, and the VAE: the classes' defaults."""
TEXT_WIDTH = 16
READ_LAYERS = (9, 18, 27)
"""The layers of its text encoder that the pipeline reads, so that even a tiny one needs 28 of them."""


def tiny_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, Qwen's special tokens, and its chat template."""
    letters = sorted(ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
        chat_template=CHAT,
        model_max_length=131072,
        padding_side="right",
    )


def tiny_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """28 layers, 16 wide."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=max(READ_LAYERS) + 1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_transformer(**changes: Any) -> Flux2Transformer2DModel:
    """Two double-stream and two single-stream blocks, 32 wide; 16 x 4 x 4 latents."""
    options: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": len(READ_LAYERS) * TEXT_WIDTH,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return Flux2Transformer2DModel(**(options | changes))


def tiny_vae() -> AutoencoderKLFlux2:
    """16 x 16 images to 4 x 8 x 8, which is 16 x 4 x 4 in patches, with statistics that are not 0 and 1."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def make() -> Flux2KleinPipeline:
    """A Flux2KleinPipeline with the published schedule."""
    tokenizer = tiny_tokenizer()
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_transformer(),
    )


def make_full_size() -> Flux2KleinPipeline:
    """FLUX.2-klein-base-4B."""
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(),
        text_encoder=Qwen3ForCausalLM(qwen3_4b()),
        tokenizer=tiny_tokenizer(),
        transformer=Flux2Transformer2DModel(**KLEIN_BASE_4B),
    )
