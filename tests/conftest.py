"""A tiny Stable Diffusion 1.5 pipeline with seeded random weights: tests need no hub, no GPU and no training."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.policy import Policy
from agsm_rl.shapes.train_base import TEXT_LENGTH, assemble, make_tokenizer
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.rollouts import Rollouts

TEXT_WIDTH = 32


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers, 32 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def tiny_unet() -> UNet2DConditionModel:
    """Cross-attention in both down blocks, the mid block and both up blocks; 4 x 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
    )


def tiny_vae() -> AutoencoderKL:
    """16 x 16 images to 8 x 8 latents, with Stable Diffusion's scaling factor."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in SD1.5's layout."""
    folder = tmp_path_factory.mktemp("tiny-sd15")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = make_tokenizer(folder)
        pipeline = assemble(
            vae=tiny_vae(), text_encoder=tiny_text_encoder(tokenizer), tokenizer=tokenizer, unet=tiny_unet()
        )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion 1.5's
    pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, **betas})
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def backbone(tiny_checkpoint: Path) -> StableDiffusion:
    """A fresh backbone, with nothing attached."""
    return StableDiffusion(str(tiny_checkpoint), device="cpu")


class Brightness:
    """The mean of an image: a reward that needs no weights."""

    name = "brightness"
    range = (0.0, 1.0)
    differentiable = True

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


class OneProcess:
    """The only process of a run."""

    index, count = 0, 1

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture
def make_backbone(tiny_checkpoint: Path):
    return lambda: StableDiffusion(str(tiny_checkpoint), device="cpu")


@pytest.fixture
def make_policy(make_backbone):
    """Policies with two banks of soft tokens and LoRA, all from one seed."""

    def make(ema_decay: float = 0.9) -> Policy:
        adapters = {"tokens": SoftTokens(num_tokens=2), "lora": LoRA(rank=2, banks=2)}
        return Policy(make_backbone(), adapters, ema_decay=ema_decay)

    return make


@pytest.fixture
def policy(make_policy) -> Policy:
    return make_policy()


@pytest.fixture
def make_pairs():
    """A source of the shapes world's pairs, four at a time, drawn at the tiny backbone's size."""
    return lambda **options: Pairs("builtin:shapes", **({"batch_size": 4, "num_images": 24} | options))


@pytest.fixture
def make_rollouts(tmp_path: Path):
    """A source of 2 x 2 rollouts of 4 steps, rewarded by their brightness."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue circle\ntwo green squares\n")

    def make(*, bind: bool = False, **options) -> Rollouts:
        settings = {"prompts": str(prompts), "rewards": [(Brightness(), 1.0)], "num_prompts": 2}
        settings |= {"images_per_prompt": 2, "num_steps": 4, "guidance": 1.0}
        source = Rollouts(**(settings | options))
        if bind:
            source.bind("ddpo", 0, OneProcess())
        return source

    return make


@pytest.fixture
def rollouts(make_rollouts) -> Rollouts:
    return make_rollouts(bind=True)
