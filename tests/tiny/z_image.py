"""A tiny ZImagePipeline with seeded random weights, and the published one without weights."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny_pipelines import FLUX_VAE, full_size_flux_vae, tiny_vae
from tiny_qwen import WIDTH, qwen3_4b, tiny_qwen3, tiny_qwen_tokenizer
from transformers import Qwen3Model

SIZE = 6.15


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
        vae=tiny_vae(16, **FLUX_VAE),
        text_encoder=tiny_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_transformer(),
    )


def make_full_size() -> ZImagePipeline:
    """The published sizes, which are the defaults of diffusers' transformer; FLUX.1's VAE and Qwen3-4B."""
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=full_size_flux_vae(),
        text_encoder=Qwen3Model(qwen3_4b()),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=ZImageTransformer2DModel(),
    )
