"""Draw the images of a suite into a folder: with everything pinned that decides them, resumable, and shared out.

Image k of prompt i is drawn from the noise of seed + i + 1,000,000 · k, whoever draws it: two targets have the same
noise, and several processes draw what one would.
"""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
from rich.console import Console

from agsm_rl import __version__
from agsm_rl.adapters.guidance import GuidanceBank, GuidancePrompt
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw, to_picture, write_picture
from agsm_rl.evaluate.image_folder import SAMPLES, Drawn, is_whole, sha256, write_metadata
from agsm_rl.evaluate.progress import progress
from agsm_rl.evaluate.target import Target
from agsm_rl.files import read_json, write_text
from agsm_rl.recipe.earlier import block_of_today
from agsm_rl.recipe.parts import Parts

STRIDE = 1_000_000
PINNED = "drawing.json"
ELSEWHERE = ("device", "dtype", "resolution", "gradient_checkpointing", "local_files_only")
"""Options of a backbone that are pinned under their own names, or change no image."""


@dataclass(frozen=True)
class DrawingSettings:
    """How images are drawn; None is the target's own choice. `prompt_suffix` is read behind each prompt."""

    seed: int = 0
    guidance: float | None = None
    num_steps: int | None = None
    batch_size: int = 8
    prompt_suffix: str = ""
    guidance_bank: GuidanceBank | None = None
    guidance_prompt: GuidancePrompt | None = None


@dataclass(frozen=True)
class Share:
    """A share of the work: every `count`-th piece, beginning with number `index`."""

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


def plan(folder: Path, asked: Mapping[int, Mapping[str, Any]], num_images: int) -> list[Drawn]:
    """The images to be: each prompt's first, then each one's second, … until there are `num_images`."""
    indices = list(asked)
    places = [(indices[j % len(indices)], j // len(indices)) for j in range(num_images)]
    return [image_of(folder, index, number, asked[index]) for index, number in places]


def image_of(folder: Path, prompt_index: int, number: int, metadata: Mapping[str, Any]) -> Drawn:
    """Image `number` of a prompt, where it belongs."""
    path = folder / f"{prompt_index:05d}" / SAMPLES / f"{number:04d}.png"
    return Drawn(path, prompt_index, number, metadata)


def pinned(target: Target, how: DrawingSettings) -> dict[str, Any]:
    """All that decides the images besides the prompts, as plain data."""
    pipeline = target.backbone.pipeline
    scheduler = {"class": type(pipeline.scheduler).__name__}
    scheduler |= {key: value for key, value in pipeline.scheduler.config.items() if key[0] != "_"}
    return json.loads(
        json.dumps(
            {
                "target": target.name,
                "backbone": {key: value for key, value in target.block.items() if key not in ELSEWHERE},
                "adapters": {file.name: sha256(file) for file in target.files},
                "seed": how.seed,
                "guidance": target.guidance if how.guidance is None else how.guidance,
                "num_steps": how.num_steps or target.num_steps,
                **target.guidance_form(),
                "prompt_suffix": how.prompt_suffix,
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
    """Of what draws and measures."""
    found = {name: version(name) for name in ("torch", "diffusers", "transformers", "pillow")}
    return {"agsm_rl": __version__, "python": platform.python_version()} | found


def draw_images(
    wanted: Sequence[Drawn],
    folder: Path,
    target: Target,
    how: DrawingSettings,
    shard: Share,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw this share of the wanted images, but for those that are there and whole; the pinned settings.

    UserError if the folder holds images that were drawn otherwise.
    """
    with target.using("positive", how.guidance_bank, how.guidance_prompt):
        return _draw_as_pinned(wanted, folder, target, how, shard, console)


def _draw_as_pinned(
    wanted: Sequence[Drawn],
    folder: Path,
    target: Target,
    how: DrawingSettings,
    shard: Share,
    console: Console | None,
) -> dict[str, Any]:
    settings = _pin(folder, pinned(target, how) | {"num_images": len(wanted)})
    own = shard.of(wanted)
    missing = [item for item in own if not is_whole(item.path)]
    for item in {item.prompt_index: item for item in own}.values():
        write_metadata(item.path.parents[1], item.metadata)
    done = len(own) - len(missing)
    with progress(f"drawing {target.name}", total=len(own), done=done, console=console) as advance:
        for start in range(0, len(missing), how.batch_size):
            part = missing[start : start + how.batch_size]
            images = draw(
                target.backbone,
                [item.prompt + how.prompt_suffix for item in part],
                [seed_of(how.seed, item.prompt_index, item.number) for item in part],
                guidance=settings["guidance"],
                num_steps=settings["num_steps"],
                batch_size=how.batch_size,
            )
            for item, image in zip(part, images, strict=True):
                write_picture(to_picture(image), item.path)
            advance(len(part))
    return settings


def read_pinned(folder: Path) -> dict[str, Any] | None:
    """The settings that a folder was drawn with; None where another tool drew it."""
    file = folder / PINNED
    if not file.exists():
        return None
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"{error} Remove {folder} and draw again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("num_images"), int):
        raise UserError(f"{file}: is not a record of how images were drawn; remove {folder} and draw again.")
    # A folder that is older than an option says nothing of it.
    return {"prompt_suffix": "", "guidance_bank": "positive", "guidance_prompt": "empty"} | content


def _pin(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the settings into a new folder, or check them against those of the images that are there."""
    there = read_pinned(folder)
    if there is None:
        if folder.is_dir() and any(place.name.isdigit() for place in folder.iterdir()):
            raise UserError(
                f"--images {folder}: there are images of another tool in it (no {PINNED}); give another folder, or "
                f"evaluate them as they are: agsm-rl eval {folder} …"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PINNED, json.dumps(settings, indent=1) + "\n")
        return settings
    for key, now in settings.items():
        # Another machine, or a newer library, may go on with the drawing; the first one's stay on record.
        if key not in ("target", "device", "versions", "num_images") and not _same(key, now, there.get(key), folder):
            raise UserError(
                f"--images {folder}: its images were drawn with {key} = {_short(there.get(key))}, now it is "
                f"{_short(now)}; go on with the same options, or give another folder."
            )
    if there["num_images"] < settings["num_images"]:
        there["num_images"] = settings["num_images"]
        write_text(folder / PINNED, json.dumps(there, indent=1) + "\n")
    return there


def _same(key: str, now: Any, then: Any, folder: Path) -> bool:
    """Whether a setting means what it did, whatever options have come in since then."""
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
    """What the installed diffusers has a scheduler do where its configuration says nothing."""
    made = getattr(diffusers, str(scheduler.get("class")), None)
    parameters = inspect.signature(made).parameters.values() if made else ()
    defaults = {known.name: known.default for known in parameters if known.default is not known.empty}
    content: dict[str, Any] = json.loads(json.dumps(defaults, default=str))
    return content


def _complete(backbone: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    block = block_of_today("backbones", backbone, Parts(where=str(folder / PINNED)))
    return {key: value for key, value in block.model_dump(mode="json").items() if key not in ELSEWHERE}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
