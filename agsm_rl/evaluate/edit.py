"""`agsm-rl edit`: one image, edited from one prompt to another, beside its source and, if asked, the base's edit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from agsm_rl.editing.editor import CompleteSettings, EditSettings, edit
from agsm_rl.errors import UserError
from agsm_rl.evaluate.captions import captioned_grid
from agsm_rl.evaluate.draw_folder import versions
from agsm_rl.evaluate.drawing import to_picture, write_picture
from agsm_rl.evaluate.sample import free_suffix
from agsm_rl.evaluate.target import Target
from agsm_rl.files import local_path, replacing, write_text
from agsm_rl.interfaces import Bank
from agsm_rl.policy import using
from agsm_rl.sources.latents import fit
from agsm_rl.sources.pictures import read_picture
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt
from agsm_rl.training.prompt_lengths import warn_of_cut_prompts


@dataclass(frozen=True)
class EditOptions:
    """What to edit and how. `source` says what the image shows, `target` what it should show."""

    source: str
    target: str
    seed: int = 0
    settings: EditSettings = EditSettings()
    bank: Bank = "positive"
    guidance_bank: GuidanceBank | None = None
    guidance_prompt: GuidancePrompt | None = None
    compare: bool = False


def open_image(path: Path) -> Image.Image:
    """The image file as upright RGB; UserError where there is none, or it cannot be read."""
    path = local_path(path)
    if not path.exists():
        raise UserError(f"IMAGE {path}: there is no such file.")
    if path.is_dir():
        raise UserError(f"IMAGE {path}: this is a folder; give an image file.")
    return read_picture(path, f"IMAGE {path}")


def draw_edit(
    target: Target, picture: Image.Image, stem: str, out: Path, options: EditOptions, *, tell: Callable[[str], None]
) -> None:
    """Write the source as the model sees it, the edit, the base's edit, a grid and the settings into a folder.

    Files that are there are kept. `stem` begins the names of the new ones; `tell` gets each path. UserError, before
    anything is drawn, for settings that the model does not take, and for `compare` with a base.
    """
    if options.compare and target.handle is None:
        raise UserError("--compare: the target is a base itself; give a run folder or an exported adapter.")
    settings = options.settings.complete(target.backbone, guidance=target.guidance)
    warn_of_cut_prompts([options.source, options.target], target.backbone, name="edit")
    image = fit(picture, target.backbone.resolution)
    images = {"source": image}
    with target.using(options.bank, options.guidance_bank, options.guidance_prompt):
        form = target.guidance_form()
        images["edited"] = _edited(target, image, settings, options)
    if options.compare:
        with _switched_off(target):
            images["base"] = _edited(target, image, settings, options)
    suffix = free_suffix(out, [f"{stem}-{kind}" for kind in ("source", "edited", "base", "grid", "edit")])
    for kind, drawn in images.items():
        path = out / f"{stem}-{kind}{suffix}.png"
        write_picture(to_picture(drawn), path)
        tell(str(path))
    tell(str(_write_grid(images, out / f"{stem}-grid{suffix}.jpg", options)))
    path = out / f"{stem}-edit{suffix}.json"
    write_text(path, json.dumps(_description(target, settings, form, options), indent=1) + "\n")
    tell(str(path))


def _edited(target: Target, image: Tensor, settings: CompleteSettings, options: EditOptions) -> Tensor:
    prompts = [options.source], [options.target]
    return edit(target.backbone, image[None], *prompts, seeds=[options.seed], settings=settings)[0]


def _switched_off(target: Target) -> AbstractContextManager[None]:
    """Within the block, the target is its base."""
    return using(list(target.handle.adapters.values()) if target.handle else [], None)


def _write_grid(images: Mapping[str, Tensor], path: Path, options: EditOptions) -> Path:
    captions = [options.source if kind == "source" else options.target for kind in images]
    sheet = captioned_grid(torch.stack(list(images.values())), captions, columns=len(images), titles=tuple(images))
    with replacing(path) as aside:
        sheet.save(aside, format="JPEG", quality=92)
    return path


def _description(
    target: Target, settings: CompleteSettings, form: Mapping[str, str], options: EditOptions
) -> dict[str, Any]:
    """What made the edit, as plain data."""
    return {
        "target": target.name,
        "from": options.source,
        "to": options.target,
        **asdict(settings),
        "n_max": settings.n_max,
        "seed": options.seed,
        "bank": options.bank,
        **form,
        "resolution": target.backbone.resolution,
        "dtype": str(target.backbone.pipeline.dtype).removeprefix("torch."),
        "versions": versions(),
    }
