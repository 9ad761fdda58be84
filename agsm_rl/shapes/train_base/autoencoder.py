"""The first stage: an autoencoder to 8 x 8 x 4 latents, whitened."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from agsm_rl.shapes.train_base.stages import Settings, run_stage

DOWNSAMPLING = 4


def train_autoencoder(
    settings: Settings, work: Path, images: Tensor, begin: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Frozen; each latent channel's mean 0 and variance 1 are folded into its 1 x 1 convolutions.

    `begin` is an autoencoder that is trained on, of any world: what it learned of edges serves other shapes too.
    """
    torch.manual_seed(settings.seed + 1)
    vae = begin.requires_grad_(True).train() if begin else _make_autoencoder(settings.world.look.image_size)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 300, settings.vae_steps)

    def step(number: int) -> dict[str, float]:
        rng = np.random.default_rng((settings.seed, 1, number))
        x = to_model_range(images[rng.integers(0, len(images), settings.batch_size)])
        generator = torch.Generator().manual_seed(number)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        error = (decoded - x).abs().mean() + 2 * F.mse_loss(decoded, x)
        divergence = posterior.kl().mean() / x[0].numel()
        (error + 1e-3 * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return {"error": error.item(), "kl": divergence.item()}

    run_stage("vae", work, settings.vae_steps, {"model": vae, "optimizer": optimizer, "schedule": schedule}, step)
    _whiten(vae, images[:4096])
    return vae.requires_grad_(False).eval()


def _make_autoencoder(image_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=image_size,
        scaling_factor=1.0,
    )


def to_model_range(images: Tensor) -> Tensor:
    """uint8 → [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def _whiten(vae: AutoencoderKL, images: Tensor) -> None:
    latents = torch.cat([vae.encode(to_model_range(part)).latent_dist.mean for part in images.split(256)])
    _refold(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))


def rescale(vae: AutoencoderKL, *, scaling_factor: float, shift_factor: float | None = None) -> None:
    """Give an autoencoder a published one's factors: (latents - shift) * scaling, white by now, stays what it is."""
    before = vae.config.shift_factor or 0.0
    std = scaling_factor / vae.config.scaling_factor
    ones = torch.ones(vae.config.latent_channels)
    _refold(vae, (before - (shift_factor or 0.0) * std) * ones, std * ones)
    vae.register_to_config(scaling_factor=scaling_factor, shift_factor=shift_factor)


@torch.no_grad()
def _refold(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make each latent channel z into (z - mean) / std without changing what the autoencoder computes."""
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
