"""Tiny pipelines of all three kinds with seeded random weights: tests need no hub, no GPU and no training."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from agsm_rl.shapes.train_base.layouts import assemble_sd15, make_scheduler
from agsm_rl.shapes.train_base.text import TEXT_LENGTH, make_tokenizer

TEXT_WIDTH = 32
XL_WIDTH, XL_POOLED = 32 + 24, 24
SD3_WIDTH, SD3_POOLED = 32, 16 + 24
FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
"""FLUX.1's, which Z-Image has too."""


def clip_config(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH, projection: int = 16) -> CLIPTextConfig:
    """Two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        projection_dim=projection,
    )


def tiny_unet(text_width: int = TEXT_WIDTH) -> UNet2DConditionModel:
    """Cross-attention in both down blocks, the mid block and both up blocks; 4 x 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text_width,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
    )


def tiny_xl_unet() -> UNet2DConditionModel:
    """As in SDXL, no cross-attention at the highest resolution, and pooled text and time ids beside the timestep."""
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=XL_WIDTH,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + XL_POOLED,
    )


def tiny_transformer(**changes: Any) -> SD3Transformer2DModel:
    """Four joint blocks, 32 wide; 16 x 8 x 8 latents."""
    options: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": SD3_WIDTH,
        "pooled_projection_dim": SD3_POOLED,
        "pos_embed_max_size": 16,
    }
    return SD3Transformer2DModel(**(options | changes))


def tiny_vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    """16 x 16 images to 8 x 8 latents, with Stable Diffusion's scaling factor."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=16,
        **options,
    )


def full_size_flux_vae() -> AutoencoderKL:
    """FLUX.1's, as in Tongyi-MAI/Z-Image's vae/config.json."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        **FLUX_VAE,
    )


def tiny_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 encoder of one layer, and a tokenizer of letters and a few words."""
    words = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in ("a", "red", "blue", "circle", "squares", "two"))]
    vocabulary = [(word, -float(index)) for index, word in enumerate([*words, *"abcdefghijklmnopqrstuvwxyz"])]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def published_scheduler() -> DDIMScheduler:
    """With the betas of Stable Diffusion 1.5 and XL."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler.from_config({**make_scheduler().config, **betas})


def make_sd15() -> Any:
    """A StableDiffusionPipeline."""
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(clip_config(tokenizer))
    pipeline = assemble_sd15(tiny_vae(), text_encoder, tokenizer=tokenizer, unet=tiny_unet())
    pipeline.scheduler = published_scheduler()
    return pipeline


def make_sdxl() -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline whose guidance text is all zeros, as the published one's."""
    tokenizer = make_tokenizer()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, 24, XL_POOLED)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_xl_unet(),
        scheduler=published_scheduler(),
    )


def make_sd3() -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline with its T5, SD3's shift, and a VAE with a shift factor."""
    tokenizer = make_tokenizer()
    t5, t5_tokenizer = tiny_t5()
    vae = tiny_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    return StableDiffusion3Pipeline(
        transformer=tiny_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, TEXT_WIDTH, 16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, 24, 24)),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


MAKERS = {"sd15": make_sd15, "sdxl": make_sdxl, "sd3": make_sd3}


def save_tiny(kind: str, folder: Path) -> Path:
    """The pipeline folder of a kind, the same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MAKERS[kind]().save_pretrained(folder)
    return folder
