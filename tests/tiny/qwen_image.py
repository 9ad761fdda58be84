"""A tiny QwenImagePipeline with seeded random weights, and the published one without weights."""

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny_qwen import WIDTH, tiny_qwen_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SIZE = 20.43
OPTIONS = {"resolution": 16}
"""The usual size is the pipeline's, and in no configuration."""


def tiny_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """Four joint blocks, 32 wide; 16 x 8 x 8 latents, which the pipeline packs to 16 rows of 64."""
    options: dict[str, Any] = {
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return QwenImageTransformer2DModel(**(options | changes))


def tiny_qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers that read text, and one that reads images, which no pipeline here uses."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def published_schedule() -> FlowMatchEulerDiscreteScheduler:
    """Shifted by the number of patches, and stretched to end at 0.02, as in Qwen/Qwen-Image's scheduler_config.json."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def make() -> QwenImagePipeline:
    """Its VAE takes 16 x 16 images to 8 x 8 latents, with the published means and deviations of 16 channels."""
    tokenizer = tiny_qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=published_schedule(),
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]),
        text_encoder=tiny_qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_transformer(),
    )


def make_full_size() -> QwenImagePipeline:
    """The published sizes, which are the defaults of diffusers' transformer and VAE.

    The text encoder's are those of Qwen/Qwen-Image's text_encoder/config.json; its part for images is the class's own.
    """
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    }
    return QwenImagePipeline(
        scheduler=published_schedule(),
        vae=AutoencoderKLQwenImage(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text)),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(),
    )
