"""`agsm-rl sample`: pictures of one or many prompts, beside the base's if asked, and a captioned grid of them all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from agsm_rl.errors import UserError
from agsm_rl.evaluate.captions import captioned_grid
from agsm_rl.evaluate.drawing import draw, to_picture, write_picture
from agsm_rl.evaluate.target import Target
from agsm_rl.files import replacing
from agsm_rl.interfaces import Bank
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt

MAX_IN_GRID = 400
"""Pictures in the grid; the first ones, where there are more."""
COLUMNS = 4
TALLEST = 65_500
"""Pixels of a JPEG's height at most; a grid has as many rows as that holds."""


@dataclass(frozen=True)
class SampleOptions:
    """How to draw: `number` pictures of each prompt, picture i from the noise of seed + i; None is the target's own."""

    number: int = 1
    seed: int = 0
    guidance: float | None = None
    num_steps: int | None = None
    negative_prompt: str | None = None
    batch_size: int = 8
    bank: Bank = "positive"
    guidance_bank: GuidanceBank | None = None
    guidance_prompt: GuidancePrompt | None = None
    compare: bool = False
    captions: bool = False
    """Also write each picture's prompt, so that the folder is a data set of image-caption pairs."""


class _Picture(NamedTuple):
    prompt: str
    seed: int
    stem: str


def draw_samples(
    target: Target, prompts: Sequence[str], out: Path, options: SampleOptions, *, tell: Callable[[str], None]
) -> None:
    """Write the pictures into a folder, next to those that are there; `tell` gets each file's path.

    UserError, before anything is drawn, for `compare` with a base, and for a negative prompt that would have no effect.
    """
    pictures = _pictures(prompts, options)
    if options.compare and options.captions:
        raise UserError("--captions: with --compare the data set would hold the base's pictures too; leave one out.")
    check_negative_prompt(target, options)
    kinds = ("base", "trained") if options.compare else ("",)
    if options.compare and target.handle is None:
        raise UserError("--compare: the target is a base itself; give a run folder or an exported adapter.")
    suffix = free_suffix(out, ["grid", *(f"{picture.stem}{end}" for picture in pictures for end in ("", "-base"))])
    kept: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds}
    for kind in reversed(kinds):  # the base last: the adapters are taken off for it
        with ExitStack() as stack:
            if kind == "base" and target.handle is not None:
                target.handle.detach()
            else:
                stack.enter_context(target.using(options.bank, options.guidance_bank, options.guidance_prompt))
            for picture, image in _drawn(target, pictures, options):
                path = out / f"{picture.stem}{'-base' if kind == 'base' else ''}{suffix}.png"
                write_picture(to_picture(image), path)
                if options.captions:
                    _add_caption(path, picture.prompt)
                tell(str(path))
                if len(kept[kind]) < MAX_IN_GRID // len(kinds):
                    kept[kind].append(image)
    if len(pictures) * len(kinds) > 1:
        tell(str(_write_grid(kept, pictures, out / f"grid{suffix}.jpg", options)))


def _add_caption(picture: Path, prompt: str) -> None:
    """A row for the picture in its folder's metadata.jsonl, where `datasets` and a source `pairs` look for captions."""
    with (picture.parent / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": picture.name, "caption": prompt}, ensure_ascii=False) + "\n")


def check_negative_prompt(target: Target, options: SampleOptions) -> None:
    """UserError for a negative prompt that guidance does not use."""
    if options.negative_prompt is None:
        return
    guidance = target.guidance if options.guidance is None else options.guidance
    if guidance <= 1:
        raise UserError(
            f"--negative-prompt: has no effect with guidance {guidance:g}, which is off; give --guidance above 1."
        )
    with target.using(options.bank, options.guidance_bank, options.guidance_prompt):
        if target.guidance_form()["guidance_prompt"] == "same":
            raise UserError(
                "--negative-prompt: the adapter guides away from the same prompt under its negative bank, which leaves "
                "no place for another; add --guidance-prompt empty."
            )


def _pictures(prompts: Sequence[str], options: SampleOptions) -> list[_Picture]:
    digits = len(str(len(prompts)))
    return [
        _Picture(prompt, seed, (f"{number:0{digits}}-" if len(prompts) > 1 else "") + f"seed-{seed}")
        for number, prompt in enumerate(prompts, 1)
        for seed in range(options.seed, options.seed + options.number)
    ]


def _drawn(
    target: Target, pictures: Sequence[_Picture], options: SampleOptions
) -> Iterator[tuple[_Picture, torch.Tensor]]:
    for start in range(0, len(pictures), options.batch_size):
        batch = pictures[start : start + options.batch_size]
        images = draw(
            target.backbone,
            [picture.prompt for picture in batch],
            [picture.seed for picture in batch],
            guidance=target.guidance if options.guidance is None else options.guidance,
            num_steps=options.num_steps or target.num_steps,
            batch_size=options.batch_size,
            negative_prompt=options.negative_prompt,
        )
        yield from zip(batch, images, strict=True)


def free_suffix(out: Path, stems: Sequence[str]) -> str:
    """An ending with which no file in the folder has any of these stems yet: none, -2, -3, …"""
    taken = {path.stem for path in out.iterdir()} if out.is_dir() else set()
    endings = ("" if number == 1 else f"-{number}" for number in count(1))
    return next(end for end in endings if not any(f"{stem}{end}" in taken for stem in stems))


def _write_grid(
    kept: dict[str, list[torch.Tensor]], pictures: Sequence[_Picture], path: Path, options: SampleOptions
) -> Path:
    """Base and trained side by side; otherwise a row for each prompt, or rows of COLUMNS for a single one."""
    per_kind = list(kept.values())
    images = torch.stack([image for together in zip(*per_kind, strict=True) for image in together])
    captions = [f"{picture.prompt} (seed {picture.seed})" for picture in pictures for _ in per_kind][: len(images)]
    several = len(pictures) > options.number and options.number > 1
    columns = 2 if options.compare else min(options.number if several else COLUMNS, len(images))
    titles = tuple(kept) if options.compare else ()
    sheet = captioned_grid(images, captions, columns=columns, titles=titles, tallest=TALLEST)
    with replacing(path) as aside:
        sheet.save(aside, format="JPEG", quality=92)
    return path
