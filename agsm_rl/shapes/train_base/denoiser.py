"""The third stage: a denoiser of any layout, trained through its backbone on captions of all kinds of reliability."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from agsm_rl.evaluate.drawing import draw
from agsm_rl.interfaces import Backbone, Cond
from agsm_rl.shapes.scenes import Scene
from agsm_rl.shapes.train_base.layouts import Layout
from agsm_rl.shapes.train_base.optimization import Optimization
from agsm_rl.shapes.train_base.representation import Representation
from agsm_rl.shapes.train_base.stages import Settings, run_stage, write_log

CAPTION_DROPOUT = 0.1
"""Share of empty captions, for classifier-free guidance."""


def train_denoiser(
    settings: Settings,
    work: Path,
    name: str,
    layout: Layout,
    backbone: Backbone,
    scenes: list[Scene],
    images: Tensor,
    teacher: Backbone | None = None,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Train the backbone's denoiser in place on uint8 images [N, 3, 32, 32]; it ends frozen, with the EMA's weights.

    With a teacher, a base of the same latents, noise schedule and kind of prediction, the target is what the teacher
    predicts for the same caption: free of the noise that hides how little a rare or weak word changes. `keep` is
    called, with the EMA's weights in place, each time that the denoiser is judged.
    """
    denoiser = backbone.denoiser.requires_grad_(True).train()
    if layout.channels_last:
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents = torch.cat([backbone.encode_images(part.float() / 255) for part in images.split(256)])
    world = settings.world
    torch.manual_seed(settings.seed + 5)
    told = Representation(denoiser, world.look, scenes) if layout.told_what_is_drawn else None
    beside = told.parameters() if told else ()
    optimization = Optimization(denoiser, settings.denoiser_steps, layout.learning_rate, layout.muon_rate, beside)
    ema = EMAModel(denoiser.parameters(), decay=0.999)
    up_text = UpBlocksText(denoiser, backbone.encode_text([""]).embeds)

    def step(number: int) -> dict[str, float]:
        rng = np.random.default_rng((settings.seed, 4, number))
        batch_size = layout.prepare(backbone, number, settings.batch_size)
        chosen = rng.integers(0, len(latents), batch_size)
        empty = rng.random(len(chosen)) < CAPTION_DROPOUT
        captions = [
            "" if none else world.base_caption(scenes[index].requirement, rng, settings.careless_plain)
            for index, none in zip(chosen, empty, strict=True)
        ]
        cond = backbone.encode_text(captions)
        up_text.choose(cond, torch.from_numpy(rng.random(len(chosen)) < settings.up_text_dropout))
        generator = torch.Generator().manual_seed(number)
        x0 = latents[chosen]
        noise = torch.randn(x0.shape, generator=generator)
        t = layout.noise_levels(torch.rand(len(x0), generator=generator))
        weight = layout.weight(_signal(backbone, t))
        x_t = backbone.add_noise(x0, noise, t)
        target = backbone.target(x0, noise, t) if teacher is None else _predicted(teacher, x_t, t, captions)
        with layout.precision():
            prediction = backbone.predict(x_t, t, cond)
        error = (prediction - target).square().mean(dim=(1, 2, 3))
        losses = {"loss": (weight * error).mean()} | ({"reading": told.loss(chosen)} if told else {})
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimization.step()
        ema.step(denoiser.parameters())
        return {name: loss.item() for name, loss in losses.items()}

    def after(steps: int) -> None:
        if settings.judge_every and steps % settings.judge_every == 0:
            with _averaged(denoiser, ema):
                write_log(work, {"stage": f"{name}_judged", "step": steps, **judged(settings, backbone)})
                keep()

    state = {"model": denoiser, "optimization": optimization, "ema": ema} | ({"representation": told} if told else {})
    run_stage(name, work, settings.denoiser_steps, state, step, after=after)
    up_text.remove()
    if told:
        told.remove()
    ema.copy_to(denoiser.parameters())
    denoiser.requires_grad_(False).eval()


def _signal(backbone: Backbone, t: Tensor) -> Tensor:
    """The share of the image in x_t, [B], at noise levels t [B]."""
    one = torch.ones(len(t), 1, 1, 1)
    return backbone.add_noise(one, torch.zeros_like(one), t).flatten()


@torch.no_grad()
def _predicted(teacher: Backbone, x_t: Tensor, t: Tensor, captions: list[str]) -> Tensor:
    """What the teacher predicts for the captions."""
    return teacher.predict(x_t, t, teacher.encode_text(captions))


@contextmanager
def _averaged(denoiser: nn.Module, ema: EMAModel) -> Iterator[None]:
    """Within the block, the denoiser has the EMA's weights."""
    ema.store(denoiser.parameters())
    ema.copy_to(denoiser.parameters())
    denoiser.eval()
    try:
        yield
    finally:
        ema.restore(denoiser.parameters())
        denoiser.train()


@torch.no_grad()
def judged(settings: Settings, backbone: Backbone, guidance: float = 3.0) -> dict[str, Any]:
    """Percent strictly right, by tag, of validation prompts that are plain and of those with a careful cue."""
    world, each, began = settings.world, settings.judge_prompts, time.time()
    rng = np.random.default_rng((settings.seed, 6))
    asked = [world.draw_requirement(rng, "validation", tag) for tag in world.tags for _ in range(each)]
    prompts = [world.describe(requirement, rng) for requirement in asked]
    backbone.t5_length = min(world.text_length, getattr(backbone, "t5_length", world.text_length))  # type: ignore[attr-defined]
    figures: dict[str, Any] = {}
    for kind, suffix in (("plain", ""), ("cued", f", {world.cues[0]}")):
        images = draw(
            backbone, [text + suffix for text in prompts], list(range(len(prompts))), guidance=guidance, num_steps=20
        )
        verdicts = [world.judge(image, requirement) for image, requirement in zip(images, asked, strict=True)]
        right = [verdict.strict for verdict in verdicts]
        figures[kind] = {
            tag: 100 * sum(right[i * each : (i + 1) * each]) // each for i, tag in enumerate(world.tags)
        } | {"all": round(100 * sum(right) / len(right), 1)}
        faults = [fault for verdict in verdicts for fault in verdict.faults]
        figures[f"{kind}_faults"] = {fault: faults.count(fault) for fault in dict.fromkeys(faults)}
    return figures | {"seconds": round(time.time() - began, 1)}


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
