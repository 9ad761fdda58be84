"""The last stage, on request: a decoder that forgives what the denoiser gets slightly wrong.

The encoder, and with it the latents and the denoiser, stay as they are. The decoder learns to draw the true picture
from what the denoiser makes of it after a little noise, much as decoders are trained with noise in RAE (arXiv
2510.11690): a small transformer errs by less than a pixel along an outline, and a judge of clean shapes sees it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from agsm_rl.interfaces import Backbone
from agsm_rl.shapes.scenes import Scene
from agsm_rl.shapes.train_base.autoencoder import to_model_range
from agsm_rl.shapes.train_base.stages import Settings, run_stage

NOISE = (0.1, 0.45)
"""The noise levels that the denoiser starts from: where each object stays where it is, and what it is."""
EULER_STEPS = 3
PICTURES = 4_000
MADE_SHARE = 0.7
"""How often a picture is decoded from what the denoiser makes of it, rather than from its own latents."""


def train_decoder(
    settings: Settings, work: Path, vae: Any, backbone: Backbone, scenes: list[Scene], images: Tensor
) -> None:
    """Train the decoder of the backbone's autoencoder in place, for `decoder_steps`, on flow matching's predictions."""
    rng = np.random.default_rng((settings.seed, 7))
    chosen = rng.choice(len(scenes), min(PICTURES, len(scenes)), replace=False)
    images = images[torch.from_numpy(chosen)]
    captions = [settings.world.describe(scenes[index].requirement, rng) for index in chosen]
    captions = [f"{caption}, {settings.world.cues[0]}" for caption in captions]
    trained = nn.ModuleList([vae.decoder, vae.post_quant_conv]).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, settings.decoder_steps)
    kinds: list[Tensor] = []

    def step(number: int) -> dict[str, float]:
        if not kinds:
            clean = torch.cat([backbone.encode_images(part.float() / 255) for part in images.split(250)])
            kinds.extend([clean, _made(backbone, clean, captions, settings.world.text_length)])
        rng = np.random.default_rng((settings.seed, 8, number))
        index = torch.from_numpy(rng.integers(0, len(images), settings.batch_size))
        made = torch.from_numpy(rng.random(len(index)) < MADE_SHARE)
        latents = torch.where(made[:, None, None, None], kinds[1][index], kinds[0][index])
        x = to_model_range(images[index])
        decoded = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
        error = (decoded - x).abs().mean() + 2 * F.mse_loss(decoded, x)
        error.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return {"error": error.item()}

    state = {"model": trained, "optimizer": optimizer, "schedule": schedule}
    run_stage(f"decoder_{settings.denoiser_steps}", work, settings.decoder_steps, state, step, every=100)
    trained.requires_grad_(False)


@torch.no_grad()
def _made(backbone: Backbone, clean: Tensor, captions: list[str], length: int) -> Tensor:
    """What the denoiser makes of latents with noise, in a few Euler steps without guidance."""
    backbone.t5_length = length  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    found = []
    for first in range(0, len(clean), 100):
        x0 = clean[first : first + 100]
        cond = backbone.encode_text(captions[first : first + 100])
        least, most = NOISE
        t = least + (most - least) * torch.rand(len(x0), generator=generator)
        x = backbone.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        for left in range(EULER_STEPS, 0, -1):
            velocity = backbone.predict(x, t * left / EULER_STEPS, cond)
            x = x - (t / EULER_STEPS)[:, None, None, None] * velocity
        found.append(x)
    return torch.cat(found)
