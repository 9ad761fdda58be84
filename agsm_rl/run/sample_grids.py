"""Sample grids during a run: the prompts and noise stay the same, so every difference comes from training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from agsm_rl.evaluate.captions import captioned_grid, stacked
from agsm_rl.evaluate.drawing import draw, write_picture
from agsm_rl.evaluate.suites.shapes import Shapes
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Samples
from agsm_rl.recipe.suites import make_suites
from agsm_rl.run.folder import RunFolder
from agsm_rl.sources.prompt_lists import read_prompts
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.guidance import guiding
from agsm_rl.training.sizes import drawing_at
from agsm_rl.training.stages import stage

COLUMNS = 4
DRAWN_BY = "agsm-rl"
"""The key of the text in a grid's PNG that holds the settings it was drawn with, the whole prompts among them."""
LARGEST_TRACKED = 2048
"""Pixels of the longer side of what trackers get."""


class SampleGrids(Callback):
    """Writes samples/step-<step>.png every `sample.every` steps, and the base's at step 0; trackers get them too.

    A grid that is there with the same settings is not drawn again when the run is resumed. UserError where the prompts
    cannot be read.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.options, self.export = folder, recipe.sample, recipe.export
        prompts = grid_prompts(recipe)
        count = self.options.num_images
        self.prompts = [prompts[i % len(prompts)] for i in range(count)] if prompts else []
        self._base: dict[float, Tensor] = {}
        """What the base drew, by guidance."""

    def begin(self, trainer: Trainer) -> None:
        """Draw the base's grid, and the checkpoint's if a kill prevented it; nothing if the run is to have none."""
        if self.prompts and self.options.every <= trainer.steps:
            self._write(trainer, 0)
            if trainer.step:
                self.on_step(trainer, trainer.step, {})

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Draw the grid if it is due."""
        if self.prompts and step % self.options.every == 0:
            self._write(trainer, step)

    def write_before_after(self, trainer: Trainer) -> None:
        """Write samples/before_after.png, for runs without a suite: the base's row above the trained model's."""
        if not self.prompts:
            return
        rows = []
        for guidance in self.options.guidance:
            before = self._base.get(guidance)
            if before is None:
                with trainer.policy.switched_off():
                    before = self.draw(trainer.policy, guidance)
            with trainer.policy.exported(self.export):
                after = self.draw(trainer.policy, guidance)
            for name, images in (("base", before), (f"after step {trainer.step}", after)):
                picture = captioned_grid(images, self.prompts, columns=len(self.prompts))
                rows.append((f"{name}, guidance {guidance:g}", picture))
        write_picture(stacked(rows), self.folder.samples / "before_after.png", about=self._about())

    def draw(self, policy: Policy, guidance: float) -> Tensor:
        """The grid's images [B, 3, H, W] at one guidance, by the policy as it is."""
        seeds = [self.options.seed + index for index in range(len(self.prompts))]
        with (
            guiding(policy.adapters.values(), self.options.guidance_bank, self.options.guidance_prompt),
            drawing_at(policy.backbone, self.options.resolution, where="sample.resolution"),
        ):
            return draw(policy.backbone, self.prompts, seeds, guidance=guidance, num_steps=self.options.num_steps)

    def _write(self, trainer: Trainer, step: int) -> None:
        path, about = self.folder.samples / f"step-{step:08d}.png", self._about(base=step == 0)
        if _drawn_by(path) == about:
            return
        with self._drawing(trainer.policy, base=step == 0):
            images = self._draw_all(trainer.policy, "the base's" if step == 0 else f"step {step}'s")
        if step == 0:
            self._base = images
        parts = {
            f"guidance {guidance:g}": captioned_grid(batch, self.prompts, columns=min(COLUMNS, len(batch)))
            for guidance, batch in images.items()
        }
        title = "base" if step == 0 else f"step {step}"
        sheet = stacked([(f"{title}, {name}", picture) for name, picture in parts.items()])
        write_picture(sheet, path, about=about)
        log_pictures(
            trainer.accelerator, {f"samples/{name.replace(' ', '_')}": part for name, part in parts.items()}, step
        )

    @contextmanager
    def _drawing(self, policy: Policy, *, base: bool) -> Iterator[None]:
        with policy.switched_off() if base else policy.exported(self.export):
            yield

    def _draw_all(self, policy: Policy, whose: str) -> dict[float, Tensor]:
        images, count = {}, len(self.prompts)
        scales = list(dict.fromkeys(self.options.guidance))
        with stage(f"drawing {whose} samples", total=count * len(scales), unit="images") as advance:
            for guidance in scales:
                images[guidance] = self.draw(policy, guidance)
                advance(count)
        return images

    def _about(self, *, base: bool = False) -> dict[str, str]:
        how = {name: getattr(self.options, name) for name in ("guidance", "num_steps", "seed")}
        how |= {} if self.options.resolution is None else {"resolution": self.options.resolution}
        how |= {"prompts": self.prompts} | ({} if base else {"export": self.export})
        form = {name: getattr(self.options, name) for name in ("guidance_bank", "guidance_prompt")}
        how |= {} if base else {name: value for name, value in form.items() if value}
        return {DRAWN_BY: json.dumps(how, ensure_ascii=False)}


def grid_prompts(recipe: Recipe) -> list[str]:
    """The prompts of the grid, as many as there are or are needed; UserError where they cannot be read."""
    options = recipe.sample
    if isinstance(options.prompts, str):
        return prompts_in(options, where=recipe.parts.at("sample.prompts"))
    if options.prompts is None and recipe.evaluate is not None:
        return _prompts_of_suite(recipe)
    return options.prompts or []


def _prompts_of_suite(recipe: Recipe) -> list[str]:
    """The first prompts of the first suite; of a drawn world, those of the grid's own seed."""
    assert recipe.evaluate is not None
    suite = make_suites(recipe.evaluate, recipe.parts)[0].suite
    if isinstance(suite, Shapes):
        return suite.first_prompts(recipe.sample.num_images, recipe.sample.seed)
    rows = list(suite.prompts().values())[: recipe.sample.num_images]
    return [str(row["prompt"]) for row in rows]


def prompts_in(options: Samples, *, where: str) -> list[str]:
    """The first prompts of the file or data set that `sample.prompts` names."""
    assert isinstance(options.prompts, str)
    rows = read_prompts(
        options.prompts,
        column=options.prompt_column,
        split=options.prompt_split,
        config=options.prompt_config,
        limit=options.num_images,
        where=where,
    )
    return [row.text for row in rows]


def _drawn_by(path: Path) -> Mapping[str, str] | None:
    """The settings in a grid's file; None where there is no whole file."""
    with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError), Image.open(path) as picture:
        picture.load()
        return {DRAWN_BY: str(picture.info[DRAWN_BY])} if DRAWN_BY in picture.info else None
    return None


def log_pictures(accelerator: Accelerator, pictures: Mapping[str, Image.Image], step: int) -> None:
    """Send pictures, by name, to the trackers that take images."""
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        small = {name: _reduced(picture) for name, picture in pictures.items()}
        if tracker.name == "tensorboard":
            batches = {name: np.asarray(picture)[None] for name, picture in small.items()}
            tracker.log_images(batches, step=step, dataformats="NHWC")
        elif tracker.name in ("aim", "clearml"):
            tracker.log_images(small, step=step)
        else:
            tracker.log_images({name: [picture] for name, picture in small.items()}, step=step)


def _reduced(picture: Image.Image) -> Image.Image:
    copy = picture.copy()
    copy.thumbnail((LARGEST_TRACKED, LARGEST_TRACKED))
    return copy
