"""One AGSM step and one DDPO draw and update at a published model's real size, with random weights.

    python benchmarks/full_size.py sd15 | sdxl | sd3 [--resolution 512] [--dtype bfloat16] [--device cuda]

It shows that nothing depends on the small sizes of the embedded bases, and what a step costs in seconds and memory. The
figures go to benchmarks/results/full_size_<kind>_<device>.json. Weights are random, so do not expect pictures.
The configurations are those of stable-diffusion-v1-5, stable-diffusion-xl-base-1.0 and stable-diffusion-3-medium.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import typer
from agsm_rl_rewards.brightness import Brightness
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from measure import resident_bytes, write_result
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import backbone_of
from agsm_rl.backbones.loading import find_checkpoint
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.policy import Objective, Source
from agsm_rl.shapes.train_base.layouts import make_scheduler
from agsm_rl.shapes.train_base.text import make_tokenizer
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.rollouts import Rollouts

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


class Meter:
    """Measures seconds and peak memory."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")

    def run(self, what: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """Run `what` once and measure it; on a CPU, the peak is the process's since its start, weights included."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        metrics = what()
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        bytes_ = torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes(peak=True)
        figures = {key: round(value, 6) for key, value in metrics.items() if "/" in key}
        return {"seconds": round(seconds, 2), "peak_gib": round(bytes_ / 2**30, 2), "metrics": figures}


def main(
    kind: Annotated[Literal["sd15", "sdxl", "sd3"], typer.Argument()],
    resolution: Annotated[int | None, typer.Option(help="default: the model's own")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="type of the frozen weights")] = "float32",
    device: str = "cpu",
    batch_size: Annotated[int, typer.Option(min=2, help="images for AGSM, with two prompts each")] = 2,
    images: Annotated[int, typer.Option(min=2, help="images per draw for DDPO")] = 2,
    num_steps: Annotated[int, typer.Option(min=1, help="sampling steps for DDPO")] = 2,
) -> None:
    """Run both and record what they cost."""
    torch.manual_seed(0)
    pipeline = MAKERS[kind]().to(device)
    if dtype != "float32":
        pipeline.to(getattr(torch, dtype))
    backbone = backbone_of(pipeline, resolution=resolution, gradient_checkpointing=True)
    policy = Policy(backbone, {"tokens": SoftTokens(num_tokens=4)})
    flow = kind == "sd3"
    drawn = Rollouts(
        "builtin:shapes-prompts", [(Brightness(), 1.0)], num_prompts=images // 2, images_per_prompt=2,
        num_steps=num_steps, guidance=1.0, advantages="group", sample_batch_size=1,
    )  # fmt: skip
    learned: dict[str, tuple[Objective, Source]] = {
        "agsm": (AGSM(group_size=2), Pairs("builtin:shapes", batch_size, num_images=8)),
        "flow_grpo" if flow else "ddpo": (FlowGRPO() if flow else DDPO(), drawn),
    }
    meter, steps = Meter(device), {}
    for name, (objective, source) in learned.items():
        trainer = Trainer(policy, [Term(objective, source, name=name)], steps=1)
        steps[name] = meter.run(trainer.run_step)
        print(name, steps[name], flush=True)
        # Write after each, so that its figures survive if the next one, which takes minutes on a CPU, is interrupted.
        write_result(
            f"full_size_{kind}_{device.partition(':')[0]}",
            what=f"random {kind} at full size, {backbone.resolution} px, {dtype}, gradient checkpointing, 4 tokens; "
            f"AGSM: {batch_size} images x 2 prompts; policy gradient: {images} images x {num_steps} sampling steps",
            device=device,
            denoiser_parameters=sum(parameter.numel() for parameter in backbone.denoiser.parameters()),
            trained_parameters=sum(parameter.numel() for parameter in policy.parameters().values()),
            latents=list(backbone.latent_shape),
            steps=steps,
        )


if __name__ == "__main__":
    typer.run(main)
