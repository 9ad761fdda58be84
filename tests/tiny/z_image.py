"""A tiny ZImagePipeline with seeded random weights, and the published one without weights."""

from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny_pipelines import tiny_vae
from tiny_qwen import WIDTH, tiny_qwen3, tiny_qwen_tokenizer
from transformers import Qwen3Config, Qwen3Model

SIZE = 6.15
VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
"""FLUX.1's, as published."""


def tiny_transformer(**changes: Any) -> ZImageTransformer2DModel:
    """Four layers, 32 wide, after one refiner each for text and image; 16 x 8 x 8 latents."""
    options: dict[str, Any] = {
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [1024, 64, 64],
    }
    return ZImageTransformer2DModel(**(options | changes))


def make() -> ZImagePipeline:
    """With the base model's shift of the noise levels."""
    tokenizer = tiny_qwen_tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(16, **VAE),
        text_encoder=tiny_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_transformer(),
    )


def make_full_size() -> ZImagePipeline:
    """The published sizes, which are the defaults of diffusers' transformer.

    The text encoder's and the VAE's are those of Tongyi-MAI/Z-Image's text_encoder/config.json and vae/config.json.
    """
    text = Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            **VAE,
        ),
        text_encoder=Qwen3Model(text),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=ZImageTransformer2DModel(),
    )
