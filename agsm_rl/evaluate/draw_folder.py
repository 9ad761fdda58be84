"""Draw a suite's images into a folder: resumable, split over processes, with everything recorded that decides them.

Image k of prompt i is always drawn from the noise of seed + i + 1,000,000 · k, so two targets get the same noise, and
several processes draw the same images as one.
"""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
from PIL.Image import Image
from rich.console import Console
from torch import Tensor

from agsm_rl import __version__
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import to_picture, write_picture
from agsm_rl.evaluate.image_folder import Drawn, file_name, is_whole, sha256, write_metadata
from agsm_rl.evaluate.progress import progress
from agsm_rl.evaluate.suite import Asked, Metadata, Suite
from agsm_rl.evaluate.target import Target
from agsm_rl.files import read_json, write_text
from agsm_rl.interfaces import Backbone, Bank
from agsm_rl.recipe.earlier import block_of_today
from agsm_rl.recipe.parts import Parts
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt

STRIDE = 1_000_000
PINNED = "drawing.json"
ELSEWHERE = ("device", "dtype", "resolution", "gradient_checkpointing", "local_files_only")
"""Backbone options that are recorded under separate keys, or change no image."""


@dataclass(frozen=True)
class DrawingSettings:
    """How images are drawn; None leaves the choice to the target, or to the images that it is compared with.

    Where neither has one, the seed is 0, and `prompt_suffix`, which is added to each prompt, is empty.
    """

    seed: int | None = None
    guidance: float | None = None
    num_steps: int | None = None
    batch_size: int = 8
    prompt_suffix: str | None = None
    bank: Bank = "positive"
    guidance_bank: GuidanceBank | None = None
    guidance_prompt: GuidancePrompt | None = None


@dataclass(frozen=True)
class Share:
    """A share of the work: every `count`-th piece, starting at number `index`."""

    index: int = 0
    count: int = 1

    def of(self, pieces: Sequence[Any]) -> list[Any]:
        """This share of the pieces."""
        return list(pieces[self.index :: self.count])

    @staticmethod
    def parse(text: str) -> Share:
        """From `2/4`, the second of four; UserError for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UserError(f"--shard {text}: give it as i/n with i from 1 to n, e.g. 1/4 for the first of four.")
        return Share(int(index) - 1, int(count))


def seed_of(seed: int, prompt_index: int, number: int) -> int:
    """The seed of image `number` of a prompt."""
    return seed + prompt_index + STRIDE * number


def plan(prompts: Mapping[int, Metadata], num_images: int) -> list[Asked]:
    """The images to draw: the first of each prompt, then the second of each, … up to `num_images`."""
    indices = list(prompts)
    places = [(indices[j % len(indices)], j // len(indices)) for j in range(num_images)]
    return [Asked(index, number, prompts[index]) for index, number in places]


def image_of(folder: Path, asked: Asked) -> Drawn:
    """An image with its path in a folder."""
    path = folder / file_name(asked.prompt_index, asked.number)
    return Drawn(path, asked.prompt_index, asked.number, asked.metadata)


def pinned(target: Target, settings: DrawingSettings) -> dict[str, Any]:
    """Everything besides the prompts that decides the images, as plain data."""
    pipeline = target.backbone.pipeline
    scheduler = {"class": type(pipeline.scheduler).__name__}
    scheduler |= {key: value for key, value in pipeline.scheduler.config.items() if key[0] != "_"}
    return json.loads(
        json.dumps(
            {
                "target": target.name,
                "backbone": {key: value for key, value in target.block.items() if key not in ELSEWHERE},
                "adapters": {file.name: sha256(file) for file in target.files},
                "seed": settings.seed or 0,
                "guidance": target.guidance if settings.guidance is None else settings.guidance,
                "num_steps": settings.num_steps or target.num_steps,
                **target.guidance_form(),
                "prompt_suffix": settings.prompt_suffix or "",
                "bank": settings.bank,
                "resolution": target.backbone.resolution,
                "call_options": target.backbone.call_options,
                "dtype": str(pipeline.dtype).removeprefix("torch."),
                "scheduler": scheduler,
                "device": target.backbone.device.type,
                "versions": versions(),
            },
            default=str,
        )
    )


def versions() -> dict[str, str]:
    """The versions of everything that draws and measures."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "pillow")}
    return {"agsm_rl": __version__, "python": platform.python_version()} | libraries


def draw_images(
    suite: Suite,
    wanted: Sequence[Drawn],
    folder: Path,
    target: Target,
    how: DrawingSettings,
    shard: Share,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw the suite's images of this share that are missing or damaged, and return the recorded settings.

    UserError if the folder holds images that were drawn with other settings.
    """
    with target.using(how.bank, how.guidance_bank, how.guidance_prompt):
        return _draw_as_pinned(suite, wanted, folder, target, how, shard, console)


def _draw_as_pinned(
    suite: Suite,
    wanted: Sequence[Drawn],
    folder: Path,
    target: Target,
    how: DrawingSettings,
    shard: Share,
    console: Console | None,
) -> dict[str, Any]:
    settings = _pin(folder, pinned(target, how) | {"num_images": len(wanted)})
    share = shard.of(wanted)
    missing = [item for item in share if not is_whole(item.path)]
    for item in {item.prompt_index: item for item in share}.values():
        write_metadata(item.path.parents[1], item.metadata)
    done = len(share) - len(missing)
    with progress(f"drawing {target.name}", total=len(share), done=done, console=console) as advance:
        for start in range(0, len(missing), how.batch_size):
            part = missing[start : start + how.batch_size]
            how_now = replace(how, guidance=settings["guidance"], num_steps=settings["num_steps"])
            for item, picture in zip(part, draw_pictures(suite, target.backbone, part, how_now), strict=True):
                write_picture(picture, item.path)
            advance(len(part))
    return settings


def draw_pictures(
    suite: Suite, backbone: Backbone, asked: Sequence[Asked | Drawn], how: DrawingSettings
) -> list[Image]:
    """One batch of a suite's pictures, as a user would save them; `guidance` and `num_steps` must be given."""
    return [to_picture(image) for image in draw_batch(suite, backbone, asked, how)]


def draw_batch(suite: Suite, backbone: Backbone, asked: Sequence[Asked | Drawn], how: DrawingSettings) -> Tensor:
    """The same as images [B, 3, H, W] in [0, 1] on the CPU."""
    assert how.guidance is not None and how.num_steps is not None
    return suite.draw(
        backbone,
        [item.prompt + (how.prompt_suffix or "") for item in asked],
        [seed_of(how.seed or 0, item.prompt_index, item.number) for item in asked],
        [item.metadata for item in asked],
        guidance=how.guidance,
        num_steps=how.num_steps,
    )


def read_pinned(folder: Path) -> dict[str, Any] | None:
    """The settings that a folder was drawn with; None if another tool drew it."""
    file = folder / PINNED
    if not file.exists():
        return None
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"{error} Remove {folder} and draw again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("num_images"), int):
        raise UserError(f"{file}: does not record how images were drawn; remove {folder} and draw again.")
    # Folders from before an option existed do not mention it.
    return {"prompt_suffix": "", "bank": "positive", "guidance_bank": "positive", "guidance_prompt": "empty"} | content


def _pin(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the settings into a new folder, or check them against those of its images."""
    there = read_pinned(folder)
    if there is None and folder.is_dir() and any(place.name.isdecimal() for place in folder.iterdir()):
        there = read_pinned(folder)  # another share may have begun between the two looks
        if there is None:
            raise UserError(
                f"--images {folder}: holds images drawn by another tool (it has no {PINNED}); give another folder, or "
                f"evaluate these images with agsm-rl eval {folder} …"
            )
    if there is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PINNED, json.dumps(settings, indent=1) + "\n")
        return settings
    for key, now in settings.items():
        # Another machine or a newer library may continue the drawing; the record keeps those of the first.
        if key not in ("target", "device", "versions", "num_images") and not _same(key, now, there.get(key), folder):
            raise UserError(
                f"--images {folder}: its images were drawn with {key} = {_short(there.get(key))}, but now it is "
                f"{_short(now)}; continue with the same options, or give another folder."
            )
    if there["num_images"] < settings["num_images"]:
        there["num_images"] = settings["num_images"]
        write_text(folder / PINNED, json.dumps(there, indent=1) + "\n")
    return there


def _same(key: str, now: Any, then: Any, folder: Path) -> bool:
    """Whether a setting still means the same, even if options were added since."""
    if now == then or not isinstance(then, dict):
        return bool(now == then)
    if key == "scheduler":
        return _library_defaults(then) | then == now
    if key != "backbone":
        return False
    try:
        return _complete(now, folder) == _complete(then, folder)
    except UserError:  # names an option that no longer exists
        return False


def _library_defaults(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a scheduler in the installed diffusers."""
    scheduler_class = getattr(diffusers, str(scheduler.get("class")), None)
    parameters = inspect.signature(scheduler_class).parameters.values() if scheduler_class else ()
    defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
    content: dict[str, Any] = json.loads(json.dumps(defaults, default=str))
    return content


def _complete(backbone: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    block = block_of_today("backbones", backbone, Parts(where=str(folder / PINNED)))
    return {key: value for key, value in block.model_dump(mode="json").items() if key not in ELSEWHERE}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
