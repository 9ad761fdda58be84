"""Published models with random weights, at their real size: nothing is downloaded, so do not expect pictures.

The configurations are those of stable-diffusion-v1-5, stable-diffusion-xl-base-1.0 and stable-diffusion-3-medium.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from agsm_rl.backbones.loading import find_checkpoint, load_pipeline
from agsm_rl.shapes.train_base.layouts import make_scheduler
from agsm_rl.shapes.train_base.text import make_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # where each newer kind keeps its published configuration
from tiny import KINDS as NEWER  # noqa: E402
from tiny import tiny  # noqa: E402

TEXT_LENGTH = 77


def clip(width: int, layers: int, heads: int, *, projection: int = 0, act: str = "quick_gelu") -> Any:
    """A CLIP text encoder of a published size, with a vocabulary of the published length."""
    end = make_tokenizer().eos_token_id
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection or width,
        hidden_act=act,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def tokenizer() -> Any:
    """The shapes world's words, padded to the published 77 tokens."""
    words = make_tokenizer()
    words.model_max_length = TEXT_LENGTH
    return words


def vae(**options: Any) -> AutoencoderKL:
    """Stable Diffusion's autoencoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        **options,
    )


def t5_xxl() -> T5EncoderModel:
    """T5 v1.1 XXL's encoder."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def t5_tokenizer() -> Any:
    """The drawn world's words."""
    return AutoTokenizer.from_pretrained(find_checkpoint("builtin:shapes-sd3"), subfolder="tokenizer_3")


def make_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5, whose sizes are diffusers' defaults."""
    return StableDiffusionPipeline(
        vae=vae(sample_size=512),
        text_encoder=clip(768, 12, 12),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders (CLIP ViT-L and OpenCLIP ViT-bigG), three levels with 0, 2 and 10 transformer layers."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=vae(sample_size=1024, scaling_factor=0.13025),
        text_encoder=clip(768, 12, 12),
        text_encoder_2=clip(1280, 32, 20, projection=1280, act="gelu"),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=make_scheduler(),
        add_watermarker=False,
    )


def make_sd3(*, t5: bool = False) -> StableDiffusion3Pipeline:
    """24 joint blocks. Without the T5 (4.7 billion parameters), diffusers fills its 256 rows with zeros."""
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(
            sample_size=1024, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=clip(768, 12, 12, projection=768),
        tokenizer=tokenizer(),
        text_encoder_2=clip(1280, 32, 20, projection=1280, act="gelu"),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5_xxl() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {"sd15": make_sd15, "sdxl": make_sdxl, "sd3": make_sd3}
PUBLISHED = tuple(MAKERS)
KINDS = (*PUBLISHED, *NEWER)
DEPTHS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "num_hidden_layers", "depth")
"""Names of the number of blocks in configurations of diffusers and transformers."""


def make_on(kind: str, device: str, dtype: torch.dtype, *, layers: int | None = None) -> Any:
    """A pipeline with random weights drawn on the device; with `layers`, a newer kind of that depth and real width."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device if kind in MAKERS else "meta"):
            pipeline = MAKERS[kind]() if kind in MAKERS else tiny(kind).make_full_size()
        if kind not in MAKERS:
            assert layers is not None
            with torch.device(device):
                make_shallow(pipeline, layers)
    finally:
        torch.set_default_dtype(before)
    scheduler = pipeline.scheduler
    pipeline.register_modules(scheduler=type(scheduler).from_config(scheduler.config))  # whose tables stay on the CPU
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def make_shallow(pipeline: Any, layers: int) -> None:
    """Replace the parts of a pipeline without weights by ones with random weights, at most `layers` blocks deep."""
    for name, part in list(pipeline.components.items()):
        if not isinstance(part, torch.nn.Module):
            continue
        if hasattr(part, "save_config"):  # of diffusers
            config = {key: value for key, value in part.config.items() if not key.startswith("_")}
            depths = {key: min(layers, config[key]) for key in DEPTHS if key in config and name != "vae"}
            made = type(part).from_config(config | depths)
        else:
            sizes = deepcopy(part.config)
            for each in (sizes, *(getattr(sizes, f"{of}_config", None) for of in ("text", "vision"))):
                cut_depth(each, layers)
            made = type(part)(sizes)
        pipeline.register_modules(**{name: made})


def cut_depth(config: Any, layers: int) -> None:
    """Limit the number of blocks of one of transformers' configurations (None is none)."""
    for key in DEPTHS:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, min(layers, getattr(config, key)))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def make_toy(kind: str, device: str, dtype: torch.dtype) -> Any:
    """The shipped base of this kind, or a tiny pipeline of a newer one."""
    pipeline = load_pipeline(f"builtin:shapes-{kind}", dtype=dtype) if kind in MAKERS else tiny(kind).make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)
