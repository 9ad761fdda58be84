"""What a run shows of its pictures: sample grids at intervals, base against trained on the same prompts and noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from agsm_rl.drawing import draw, grid, write_picture
from agsm_rl.evaluate.shapes import ShapesResult, compare, evaluate, suite_prompts
from agsm_rl.evaluate.table import picture, print_table
from agsm_rl.policy import Policy
from agsm_rl.recipe import Evaluate, Recipe
from agsm_rl.resolve import Parts
from agsm_rl.run_folder import MetricsFile, RunFolder, write_text
from agsm_rl.trainer import Trainer

SHOWN = 16
"""Pairs in before_after.png: the suite's first prompts, not chosen ones."""


class SampleGrids:
    """samples/step-<step>.png each `sample.every` steps: always the same prompts and noise."""

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.options = folder, recipe.sample
        prompts = recipe.sample.prompts
        if prompts is None and recipe.evaluate is not None:
            prompts = suite_prompts(recipe.evaluate.split, recipe.sample.num_images, recipe.sample.seed)
        count = recipe.sample.num_images
        self.prompts = [prompts[i % len(prompts)] for i in range(count)] if prompts else []

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Draw the grid when it is time."""
        if self.prompts and step % self.options.every == 0:
            sheet = grid(self.draw(trainer.policy), columns=min(4, len(self.prompts)))
            write_picture(sheet, self.folder.samples / f"step-{step:08d}.png")

    def resume(self, trainer: Trainer) -> None:
        """Make up for a grid that a kill cut off after the checkpoint of its step was written."""
        if trainer.step and not (self.folder.samples / f"step-{trainer.step:08d}.png").exists():
            self.on_step(trainer, trainer.step, {})

    def on_end(self, trainer: Trainer) -> None:
        """Nothing is left to draw."""

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
        """samples/before_after.png for runs without a suite: the base's row above the trained one's."""
        if self.prompts:
            with trainer.policy.switched_off():
                before = self.draw(trainer.policy)
            sheet = grid(torch.cat([before, self.draw(trainer.policy)]), columns=len(self.prompts))
            write_picture(sheet, self.folder.samples / "before_after.png")


class Evaluation:
    """Base against trained, each `evaluate.every` steps and at the end: eval.json, evaluations.jsonl, a picture."""

    def __init__(self, folder: RunFolder, recipe: Recipe, parts: Parts, console: Console) -> None:
        self.folder, self.console = folder, console
        self.options = recipe.evaluate
        self.rewards = {
            name: parts.reward(name, "evaluate.rewards", {}) for name in (recipe.evaluate or Evaluate()).rewards
        }
        self.history = MetricsFile(folder.evaluations)
        self._base: dict[float, Measured] = {}

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Evaluate when it is time; the last step is left to `finish`."""
        options = self.options
        if options and options.every and step % options.every == 0 and step < trainer.steps and not trainer.stopping:
            for base, trained in self.measure(trainer):
                self.console.print(summary(base, trained, step), highlight=False)

    def resume(self, trainer: Trainer) -> None:
        """Make up for an evaluation that a kill cut off after the checkpoint of its step was written."""
        if self.options and trainer.step and self.history.count(trainer.step) < len(self.options.guidance):
            self.history.cut(trainer.step - 1)
            self.on_step(trainer, trainer.step, {})

    def on_end(self, trainer: Trainer) -> None:
        """Nothing is left to do: a run that was stopped is not compared."""

    def finish(self, trainer: Trainer) -> None:
        """The last evaluation, its tables, and the picture."""
        if self.options is None:
            return
        self.history.cut(trainer.steps - 1)
        found = self.measure(trainer)
        out = Console()
        for base, trained in found:
            out.rule(f"guidance {trained.guidance:g}, {self.options.split} prompts")
            print_table(base.result, trained.result, console=out)
        write_picture(before_after(*found[0]), self.folder.samples / "before_after.png")

    def measure(self, trainer: Trainer) -> list[tuple[Measured, Measured]]:
        """Base and trained at each guidance; recorded in the folder and by the trackers."""
        assert self.options is not None
        found = []
        for guidance in self.options.guidance:
            if guidance not in self._base:
                with trainer.policy.switched_off():
                    self._base[guidance] = measure(trainer.policy.backbone, self.options, guidance, self.rewards)
            trained = measure(trainer.policy.backbone, self.options, guidance, self.rewards)
            found.append((self._base[guidance], trained))
            figures = trained.figures()
            self.history.add(trainer.step, {"guidance": guidance} | figures)
            trainer.accelerator.log(
                {f"eval/guidance_{guidance:g}/{key}": value for key, value in figures.items()}, step=trainer.step
            )
        write_text(self.folder.eval, json.dumps(to_json(found, self.options, step=trainer.step), indent=1) + "\n")
        return found


class Measured:
    """What one model drew for a suite at one guidance: verdicts, mean rewards, and the first images."""

    def __init__(self, guidance: float, result: ShapesResult, rewards: dict[str, float], images: Tensor) -> None:
        self.guidance, self.result, self.rewards, self.images = guidance, result, rewards, images

    def figures(self) -> dict[str, float]:
        """The overall scores and mean rewards."""
        scores = {"overall": self.result.scores(strict=False).overall.value}
        scores["strict"] = self.result.scores(strict=True).overall.value
        return scores | {f"reward/{name}": value for name, value in self.rewards.items()}

    def to_json(self) -> dict[str, Any]:
        """The suite's content, with guidance and rewards."""
        return self.result.to_json() | {"guidance": self.guidance, "rewards": self.rewards}


def measure(backbone: Any, options: Evaluate, guidance: float, rewards: dict[str, Callable[..., Tensor]]) -> Measured:
    """Draw and judge the suite with the backbone as it stands (adapters on or off)."""
    prompts = suite_prompts(options.split, options.num_images, options.seed)
    drawn: list[Tensor] = []

    def draw_part(part: list[str], seeds: list[int]) -> Tensor:
        images = draw(
            backbone,
            part,
            seeds,
            guidance=guidance,
            num_steps=options.num_steps,
            batch_size=options.batch_size,
        )
        drawn.append(images)
        return images

    result = evaluate(draw_part, prompts, seed=options.seed, batch_size=options.batch_size)
    images = torch.cat(drawn)
    means = {name: float(reward(images, prompts).float().mean()) for name, reward in rewards.items()}
    return Measured(guidance, result, means, images[:SHOWN])


def to_json(
    found: list[tuple[Measured, Measured]] | list[tuple[None, Measured]], options: Evaluate, *, step: int | None = None
) -> dict[str, Any]:
    """eval.json: the trained model at the first guidance on top, then base and difference, and the other guidances."""
    entries = []
    for base, trained in found:
        entry = trained.to_json()
        if base is not None:
            entry |= {"base": base.to_json(), "difference": asdict(compare(base.result, trained.result))}
        entries.append(entry)
    how: dict[str, Any] = {"split": options.split, "seed": options.seed, "num_steps": options.num_steps}
    how |= {} if step is None else {"step": step}
    return entries[0] | how | ({"other_guidances": entries[1:]} if entries[1:] else {})


def summary(base: Measured, trained: Measured, step: int) -> str:
    """One line: overall scores before and after."""
    before, after = base.figures(), trained.figures()
    parts = [f"{key} {before[key]:.3f} -> {after[key]:.3f}" for key in after]
    return f"evaluation after step {step}, guidance {trained.guidance:g} (base -> trained): {', '.join(parts)}"


def before_after(base: Measured, trained: Measured) -> Any:
    """The suite's first prompts as drawn by both, framed by the strict verdict."""
    rows = list(zip(base.result.verdicts, trained.result.verdicts, strict=True))[:SHOWN]
    right = [(before.strict, after.strict) for before, after in rows]
    return picture([before.prompt for before, _ in rows], base.images, trained.images, right)
