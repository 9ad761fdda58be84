"""The third stage: a denoiser of any layout, trained through its backbone on captions of all kinds of reliability."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from agsm_rl.interfaces import Backbone, Cond
from agsm_rl.shapes import world
from agsm_rl.shapes.train_base.layouts import Layout
from agsm_rl.shapes.train_base.stages import Settings, run_stage

CAPTION_DROPOUT = 0.1
"""Share of empty captions, for classifier-free guidance."""


def train_denoiser(
    settings: Settings,
    work: Path,
    name: str,
    layout: Layout,
    backbone: Backbone,
    requirements: list[world.Requirement],
    images: Tensor,
    teacher: Backbone | None = None,
) -> None:
    """Train the backbone's denoiser in place on uint8 images [N, 3, 32, 32]; it ends frozen, with the EMA's weights.

    With a teacher, a base of the same latents, noise schedule and kind of prediction, the target is what the teacher
    predicts for the same caption: free of the noise that hides how little a rare or weak word changes.
    """
    denoiser = backbone.denoiser.requires_grad_(True).train()
    latents = torch.cat([backbone.encode_images(part.float() / 255) for part in images.split(256)])
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=layout.learning_rate, weight_decay=1e-3, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 300, settings.denoiser_steps)
    ema = EMAModel(denoiser.parameters(), decay=0.999)
    mix = replace(world.WEB_MIX, careless_plain=settings.careless_plain)
    up_text = UpBlocksText(denoiser, backbone.encode_text([""]).embeds)

    def step(number: int) -> dict[str, float]:
        rng = np.random.default_rng((settings.seed, 4, number))
        layout.prepare(backbone, number)
        chosen = rng.integers(0, len(latents), settings.batch_size)
        empty = rng.random(len(chosen)) < CAPTION_DROPOUT
        captions = [
            "" if none else world.web_caption(requirements[index], rng, mix)
            for index, none in zip(chosen, empty, strict=True)
        ]
        cond = backbone.encode_text(captions)
        up_text.choose(cond, torch.from_numpy(rng.random(len(chosen)) < settings.up_text_dropout))
        generator = torch.Generator().manual_seed(number)
        x0 = latents[chosen]
        noise = torch.randn(x0.shape, generator=generator)
        t = layout.noise_levels(torch.rand(len(x0), generator=generator))
        one = torch.ones(len(x0), 1, 1, 1)
        weight = layout.weight(backbone.add_noise(one, torch.zeros_like(one), t).flatten())
        x_t = backbone.add_noise(x0, noise, t)
        if teacher is None:
            target = backbone.target(x0, noise, t)
        else:
            with torch.no_grad():
                target = teacher.predict(x_t, t, teacher.encode_text(captions))
        with layout.precision():
            prediction = backbone.predict(x_t, t, cond)
        error = (prediction - target).square().mean(dim=(1, 2, 3))
        loss = (weight * error).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(denoiser.parameters())
        return {"loss": loss.item()}

    state = {"model": denoiser, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    run_stage(name, work, settings.denoiser_steps, state, step)
    up_text.remove()
    ema.copy_to(denoiser.parameters())
    denoiser.requires_grad_(False).eval()


class UpBlocksText:
    """Gives a U-Net's up blocks the empty prompt for chosen images; a transformer has none, and is left as it is."""

    def __init__(self, denoiser: Any, empty: Tensor) -> None:
        self.empty, self.text = empty, empty
        blocks = getattr(denoiser, "up_blocks", [])
        self.hooks = [block.register_forward_pre_hook(self._give, with_kwargs=True) for block in blocks]

    def choose(self, cond: Cond, emptied: Tensor) -> None:
        """The next call's text: the empty prompt where `emptied` [B]."""
        if self.hooks:
            self.text = torch.where(emptied[:, None, None], self.empty, cond.embeds)

    def _give(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "encoder_hidden_states": self.text}

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()
