"""Sample grids during a run: the prompts and noise stay the same, so every difference comes from training."""

from __future__ import annotations

import torch
from torch import Tensor

from agsm_rl.evaluate.drawing import draw, grid, write_picture
from agsm_rl.evaluate.suites.shapes import Shapes, suite_prompts
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.suites import make_suites
from agsm_rl.run.folder import RunFolder
from agsm_rl.trainer import Callback, Trainer


def _prompts_of_suite(recipe: Recipe) -> list[str]:
    """The first prompts of the first suite; of the shapes world, those of the grid's own seed."""
    assert recipe.evaluate is not None
    suite = make_suites(recipe.evaluate, recipe.parts)[0].suite
    if isinstance(suite, Shapes):
        return suite_prompts(suite.split, recipe.sample.num_images, recipe.sample.seed)
    rows = list(suite.prompts().values())[: recipe.sample.num_images]
    return [str(row["prompt"]) for row in rows]


class SampleGrids(Callback):
    """Writes samples/step-<step>.png every `sample.every` steps, always from the same prompts and noise."""

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.options, self.export = folder, recipe.sample, recipe.export
        prompts = recipe.sample.prompts
        if prompts is None and recipe.evaluate is not None:
            prompts = _prompts_of_suite(recipe)
        count = recipe.sample.num_images
        self.prompts = [prompts[i % len(prompts)] for i in range(count)] if prompts else []

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Draw the grid if it is due."""
        if self.prompts and step % self.options.every == 0:
            with trainer.policy.exported(self.export):
                sheet = grid(self.draw(trainer.policy), columns=min(4, len(self.prompts)))
            write_picture(sheet, self.folder.samples / f"step-{step:08d}.png")

    def resume(self, trainer: Trainer) -> None:
        """Draw the checkpoint's grid if a kill prevented it."""
        if trainer.step and not (self.folder.samples / f"step-{trainer.step:08d}.png").exists():
            self.on_step(trainer, trainer.step, {})

    def draw(self, policy: Policy) -> Tensor:
        """The grid's images [B, 3, H, W]."""
        seeds = [self.options.seed + index for index in range(len(self.prompts))]
        return draw(
            policy.backbone,
            self.prompts,
            seeds,
            guidance=self.options.guidance,
            num_steps=self.options.num_steps,
        )

    def write_before_after(self, trainer: Trainer) -> None:
        """Write samples/before_after.png, for runs without a suite: the base's row above the trained model's."""
        if self.prompts:
            with trainer.policy.switched_off():
                before = self.draw(trainer.policy)
            with trainer.policy.exported(self.export):
                after = self.draw(trainer.policy)
            sheet = grid(torch.cat([before, after]), columns=len(self.prompts))
            write_picture(sheet, self.folder.samples / "before_after.png")
