"""FLUX.1-dev: double- and single-stream blocks, embedded guidance, a CLIP and a T5."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_pipelines import FLUX_VAE, TEXT_WIDTH, clip_config, full_size_flux_vae, tiny_t5, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from agsm_rl.shapes.train_base.text import make_tokenizer

SIZE = 11.9
OPTIONS = {"t5_length": 20}


def tiny_transformer(**changes: Any) -> FluxTransformer2DModel:
    """Two double-stream and two single-stream blocks, 32 wide, with embedded guidance; 4 x 8 x 8 latents."""
    options: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**(options | changes))


def make() -> FluxPipeline:
    """A FluxPipeline with the published schedule, and a VAE with FLUX's scale and shift."""
    tokenizer = make_tokenizer()
    t5, t5_tokenizer = tiny_t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(**FLUX_VAE),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=tiny_transformer(),
    )


def make_full_size() -> FluxPipeline:
    """FLUX.1-dev, whose sizes in diffusers' conversion script are its class's defaults; CLIP ViT-L and T5 v1.1 XXL."""
    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=full_size_flux_vae(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
        tokenizer=make_tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tiny_t5()[1],
        transformer=FluxTransformer2DModel(guidance_embeds=True),
    )
