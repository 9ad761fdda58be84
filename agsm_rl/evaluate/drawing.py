"""Draw pictures with a backbone's pipeline, each with its own generator, and lay them out in grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from agsm_rl import threads
from agsm_rl.files import replacing
from agsm_rl.interfaces import Backbone
from agsm_rl.training.guidance import hooked
from agsm_rl.training.stages import Advance, stage


def draw(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: float,
    num_steps: int,
    batch_size: int = 50,
    negative_prompt: str | None = None,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] on the CPU, drawn by the backbone's pipeline as it is (adapters on or off).

    The adapters decide the unconditional branch of guidance (training/guidance.py). Image i depends on prompts[i] and
    seeds[i] only. negative_prompt: the text of the unconditional branch; None is the pipeline's own, the empty one.
    """
    batches = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        count = len(prompts[part])
        negative_prompts = None if negative_prompt is None else [negative_prompt] * count
        threads.adjust()
        with (
            hooked(backbone),
            stage(f"drawing {count} images", total=num_steps, unit="steps", worth=count) as advance,
        ):
            images = backbone.pipeline(
                prompt=list(prompts[part]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                num_inference_steps=num_steps,
                output_type="pt",
                callback_on_step_end=partial(_step_ended, advance),
                **backbone.guidance_arguments(guidance, negative_prompts, count),
                **backbone.call_options,
            ).images
        batches.append(images.float().cpu())
    return torch.cat(batches)


def _step_ended(advance: Advance, *about: Any) -> dict[str, Any]:
    """A pipeline's callback after a step, which changes none of its tensors."""
    advance(1)
    threads.adjust()
    return {}


def to_picture(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [0, 1] as a PIL picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def write_picture(picture: Image.Image, path: Path, *, about: Mapping[str, str] | None = None) -> None:
    """Write a PNG, with texts `about` it by their keys; other processes never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = PngInfo()
    for key, text in (about or {}).items():
        texts.add_itxt(key, text)
    with replacing(path) as aside:
        picture.save(aside, format="PNG", pnginfo=texts)
