"""What every stage needs: sizes, data, and a loop that is seeded, logged and resumed."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.files import replacing
from agsm_rl.shapes.scenes import Scene
from agsm_rl.shapes.worlds import SHAPES, World


@dataclass(frozen=True)
class Settings:
    """Sizes of the data and the stages; the defaults make bases like the shipped ones."""

    scenes: int = 60_000
    vae_steps: int = 2_500
    text_steps: int = 2_500
    denoiser_steps: int = 20_500
    batch_size: int = 32
    up_text_dropout: float = 0.8
    """The share of images for which a U-Net's up blocks get the empty prompt, so that the down and mid blocks, where
    soft tokens are seen, learn to carry it; left to themselves, the up blocks of so small a U-Net carry nearly all."""
    careless_plain: float | None = None
    """The share of careless ones among plain captions; only where it is large does a denoiser tell plain from cued.
    The world's when None."""
    seed: int = 0
    judge_every: int = 0
    """Steps of the denoiser between two looks at what it draws for validation prompts; 0 is never."""
    judge_prompts: int = 20
    """Prompts of each tag in such a look."""
    world: World = SHAPES


def draw_data(settings: Settings, work: Path) -> tuple[list[Scene], Tensor]:
    """The training scenes and their images, uint8 [N, 3, 32, 32]; kept in WORK_DIR."""
    path = work / "scenes.pt"
    if path.exists():
        kept = torch.load(path, weights_only=False)  # our own file, written a few lines below
        if "scenes" in kept:  # a file of before kept less, and is drawn again
            return kept["scenes"], kept["images"]
    rng = np.random.default_rng(settings.seed)
    world = settings.world
    scenes = [world.draw_scene(rng, world.draw_requirement(rng)) for _ in range(settings.scenes)]
    images = render(scenes, world)
    torch.save({"scenes": scenes, "images": images}, path)
    return scenes, images


def render(scenes: list[Scene], world: World = SHAPES) -> Tensor:
    """Their drawings, uint8 [N, 3, 32, 32]."""
    pixels = np.stack([np.asarray(world.render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def run_stage(
    name: str,
    work: Path,
    steps: int,
    state: dict[str, Any],
    step: Callable[[int], dict[str, float]],
    every: int = 500,
    after: Callable[[int], None] = lambda number: None,
) -> None:
    """Run `step` for each number up to `steps`; checkpoint `state` (things with a state_dict) and log every `every`.

    `after` is called with the number of steps that are done, each time that they are kept.
    """
    path, start = work / f"{name}.pt", 0
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept.keys() != {*state, "step"}:
            raise UserError(
                f"{path}: holds {', '.join(kept)}, but this stage keeps {', '.join([*state, 'step'])}; another version "
                "wrote it: use a new WORK_DIR"
            )
        for key, part in state.items():
            part.load_state_dict(kept[key])
        start = int(kept["step"])
    began = time.time()
    sums: dict[str, float] = {}
    for number in range(start, steps):
        for key, value in step(number).items():
            sums[key] = sums.get(key, 0.0) + value
        if (number + 1) % every == 0 or number + 1 == steps:
            row = {"stage": name, "step": number + 1, "seconds": round(time.time() - began, 1)}
            count = (number % every) + 1
            write_log(work, row | {key: round(value / count, 5) for key, value in sums.items()})
            kept = {key: part.state_dict() for key, part in state.items()} | {"step": number + 1}
            with replacing(path) as aside:
                torch.save(kept, aside)
            sums = {}
            after(number + 1)


def write_log(work: Path, row: dict[str, Any]) -> None:
    """Add a row to WORK_DIR's log."""
    with (work / "log.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")
