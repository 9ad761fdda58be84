"""Base against trained on the same prompts and noise: at intervals in a run, at its end, and for `agsm-rl eval`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agsm_rl.evaluate.drawing import draw, to_picture, write_picture
from agsm_rl.evaluate.suites.shapes import ShapesResult, compare, evaluate, suite_prompts
from agsm_rl.evaluate.table import picture, print_table
from agsm_rl.files import write_text
from agsm_rl.interfaces import Reward
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.resolve import Parts
from agsm_rl.recipe.rewards import SCORES, directions, in_evaluation
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.checkpoint_writer import CheckpointWriter
from agsm_rl.run.events import EventsFile
from agsm_rl.run.folder import MetricsFile, RunFolder
from agsm_rl.run.score_history import Standing
from agsm_rl.run.screen import make_console, styled, tell
from agsm_rl.run.stop import Interrupted
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.anomalies import Event
from agsm_rl.training.scoring import checked_score

SHOWN = 16
"""Pairs in before_after.png and in samples/eval: the suite's first prompts, not chosen ones."""


class Evaluation(Callback):
    """Base against trained, each `evaluate.every` steps and at the end: eval.json, evaluations.jsonl, a picture.

    What is measured is what would be exported. `check` is called before each batch of images and may raise Interrupted.
    `standing` keeps the best so far; when a rule of the recipe says so, the run is ended after the step (`ended` then
    says why).
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        parts: Parts,
        console: Console,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.console, self.export, self.check = folder, console, recipe.export, check
        self.options = recipe.evaluate
        entries = in_evaluation(recipe.evaluate.rewards) if recipe.evaluate else []
        self.rewards = {
            entry.name: parts.reward(entry.use, f"evaluate.rewards.{entry.key}", entry.options) for entry in entries
        }
        self.roles = {name: "trained" if trained else "held_out" for name, trained in directions(recipe).items()}
        self.standing = Standing(recipe)
        self.events = EventsFile(folder.events, console)
        self.ended: Event | None = None
        """The rule that ended the run, if one did."""
        self.checkpoints = CheckpointWriter(folder, recipe, self.standing)
        self.history = MetricsFile(folder.evaluations)
        self._base: dict[float, Measured] = {}
        self._newest: tuple[int, list[tuple[Measured, Measured]]] | None = None

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Evaluate when it is time; the last step is left to `finish`."""
        if self._due(step) and step < trainer.steps and not trainer.stopping:
            self._look_or_stop(trainer)

    def resume(self, trainer: Trainer, state: Mapping[str, Any] | None) -> None:
        """Continue with what was known (None: nothing was kept), and make up for an evaluation that a stop cut off."""
        if state is not None and not self.standing.load_state_dict(state):
            words = "evaluate: it is measured in another way than before, so the best so far begins anew"
            tell(self.console, words)
        self.checkpoints.mend_best(trainer)
        if self._due(trainer.step) and trainer.step < trainer.steps and self.standing.newest != trainer.step:
            # At several guidances, some lines may have been written already.
            self.history.cut(trainer.step - 1)
            self._look_or_stop(trainer)
        else:
            self._obey(trainer, [event for event in self.standing.verdict() if event.action == "stop"])

    def _due(self, step: int) -> bool:
        return bool(self.options and self.options.every and step and step % self.options.every == 0)

    def _look_or_stop(self, trainer: Trainer) -> None:
        """Evaluate; where a signal cuts it off, the run ends, and makes up for it when it is continued."""
        try:
            self._look(trainer)
        except Interrupted:
            trainer.stopping = True

    def _look(self, trainer: Trainer) -> None:
        found = self.measure(trainer)
        for base, trained in found:
            tell(self.console, summary(base, trained, trainer.step, self.roles))
        self._obey(trainer, self._note(trainer, found))
        self.checkpoints.after_evaluation(trainer)

    def _note(self, trainer: Trainer, found: list[tuple[Measured, Measured]]) -> list[Event]:
        base, trained = found[0]
        self.standing.note_base(base.means(), base.scores)
        return self.standing.note(trainer.step, trained.means(), trained.scores)

    def _obey(self, trainer: Trainer, events: list[Event]) -> None:
        for event in events:
            self.events.add(event)
            if event.action == "stop":
                trainer.stopping, self.ended = True, event

    def finish(self, trainer: Trainer) -> None:
        """The last evaluation, its tables, and the picture; Interrupted where a signal cuts it off."""
        if self.options is None:
            return
        if self._newest is None or self._newest[0] != trainer.step:
            events = self._note(trainer, self.measure(trainer))
            for event in [] if self.ended else events:
                # There is nothing left to be stopped.
                self.events.add(replace(event, action="warn"))
            self.checkpoints.after_evaluation(trainer)
        self._write(trainer.step)
        assert self._newest is not None
        found, out = self._newest[1], make_console()
        for base, trained in found:
            behind = f" with “{self.options.prompt_suffix}” behind them" if self.options.prompt_suffix else ""
            out.rule(styled(f"guidance {trained.guidance:g}, {self.options.split} prompts{behind}"))
            print_table(base.result, trained.result, console=out)
            if trained.rewards:
                out.print(reward_table(base.rewards, trained.rewards, self.roles))
        write_picture(before_after(*found[0]), self.folder.samples / "before_after.png")
        for base, trained in found:
            write_images(base, trained, self.folder.samples / "eval" / f"guidance-{trained.guidance:g}")

    def measure(self, trainer: Trainer) -> list[tuple[Measured, Measured]]:
        """Base and trained at each guidance; recorded in the folder and by the trackers."""
        assert self.options is not None
        self.history.cut(trainer.step - 1)
        found = []
        for guidance in self.options.guidance:
            if guidance not in self._base:
                with trainer.policy.switched_off():
                    self._base[guidance] = self._measure(trainer, guidance)
            with trainer.policy.exported(self.export), trainer.policy.using(self.options.bank):
                trained = self._measure(trainer, guidance)
            found.append((self._base[guidance], trained))
            figures = trained.figures()
            self.history.add(trainer.step, {"guidance": guidance} | figures)
            marked = {self._marked(key): value for key, value in figures.items()}
            trainer.accelerator.log(
                {f"eval/guidance_{guidance:g}/{key}": value for key, value in marked.items()}, step=trainer.step
            )
        self._newest = (trainer.step, found)
        self._write(trainer.step)
        return found

    def _measure(self, trainer: Trainer, guidance: float) -> Measured:
        assert self.options is not None
        return measure(trainer.policy.backbone, self.options, guidance, self.rewards, check=self.check)

    def _marked(self, key: str) -> str:
        """`reward/x` as `reward_held_out/x` or `reward_trained/x`."""
        name = key.removeprefix("reward/")
        return key if name == key else f"reward_{self.roles[name]}/{name}"

    def _write(self, step: int) -> None:
        """eval.json of the newest evaluation."""
        assert self.options is not None and self._newest is not None
        content = to_json(self._newest[1], self.options, step=step)
        content |= {"reward_roles": self.roles} if self.roles else {}
        content |= {"best": self.standing.best()} if self.standing.best_by else {}
        content |= {"ended_by": self.ended.to_json()} if self.ended else {}
        write_text(self.folder.eval, json.dumps(content, indent=1) + "\n")


class Measured:
    """What one model drew for a suite at one guidance: verdicts, mean rewards, and the first images.

    `scores`: each reward's scores [N], an image each; None where a measurement was read from a file that has no such.
    """

    def __init__(
        self,
        guidance: float,
        result: ShapesResult,
        rewards: dict[str, float],
        images: Tensor,
        scores: dict[str, Tensor] | None = None,
    ) -> None:
        self.guidance, self.result, self.rewards, self.images = guidance, result, rewards, images
        self.scores = scores or {}

    def overall(self) -> dict[str, float]:
        """The suite's scores by their names, reward_entries.SCORES."""
        return {name: self.result.scores(strict=name == "strict").overall.value for name in SCORES}

    def means(self) -> dict[str, float]:
        """The suite's scores and the mean rewards, by the names that rules use."""
        return self.overall() | self.rewards

    def figures(self) -> dict[str, float]:
        """The same as they are logged."""
        return self.overall() | {f"reward/{name}": value for name, value in self.rewards.items()}

    def to_json(self) -> dict[str, Any]:
        """The suite's content, with guidance and rewards."""
        return self.result.to_json() | {"guidance": self.guidance, "rewards": self.rewards}


def measure(
    backbone: Any,
    options: Evaluate,
    guidance: float,
    rewards: Mapping[str, Reward],
    *,
    check: Callable[[], None] = lambda: None,
) -> Measured:
    """Draw and judge the suite with the backbone as it stands (adapters on or off); `check` comes before each batch."""
    prompts = suite_prompts(options.split, options.num_images, options.seed)
    drawn: list[Tensor] = []

    def draw_part(part: list[str], seeds: list[int]) -> Tensor:
        check()
        images = draw(
            backbone,
            [prompt + options.prompt_suffix for prompt in part],
            seeds,
            guidance=guidance,
            num_steps=options.num_steps,
            batch_size=options.batch_size,
        )
        drawn.append(images)
        return images

    result = evaluate(draw_part, prompts, seed=options.seed, batch_size=options.batch_size)
    images = torch.cat(drawn)
    parts = range(0, len(prompts), options.batch_size)
    scores = {
        name: torch.cat(
            [
                checked_score(
                    reward,
                    images[at : at + options.batch_size].to(backbone.device),
                    prompts[at : at + options.batch_size],
                    name=name,
                ).cpu()
                for at in parts
            ]
        )
        for name, reward in rewards.items()
    }
    means = {name: float(score.mean()) for name, score in scores.items()}
    return Measured(guidance, result, means, images[:SHOWN], scores)


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
    how |= {"bank": options.bank, "prompt_suffix": options.prompt_suffix}
    how |= {} if step is None else {"step": step}
    return entries[0] | how | ({"other_guidances": entries[1:]} if entries[1:] else {})


def summary(base: Measured, trained: Measured, step: int, roles: Mapping[str, str] | None = None) -> str:
    """One line: overall scores and rewards before and after."""
    before, after = base.figures(), trained.figures()
    parts = [f"{_named(key, roles or {})} {before[key]:.3f} -> {after[key]:.3f}" for key in after]
    return f"evaluation after step {step}, guidance {trained.guidance:g} (base -> trained): {', '.join(parts)}"


def reward_table(base: Mapping[str, float], trained: Mapping[str, float], roles: Mapping[str, str]) -> Table:
    """Mean rewards of base and trained model, those that are trained on beside those that are held out."""
    made = Table(title="rewards, means", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("reward", "", "base", "trained", "difference"):
        made.add_column(column, justify="right" if column in ("base", "trained", "difference") else "left")
    for name, value in sorted(trained.items(), key=lambda item: roles[item[0]], reverse=True):
        cells = [f"{base[name]:.4g}", f"{value:.4g}", f"{value - base[name]:+.4g}"]
        made.add_row(name, "trained on" if roles[name] == "trained" else "held out", *cells)
    return made


def _named(key: str, roles: Mapping[str, str]) -> str:
    role = roles.get(key.removeprefix("reward/")) if key.startswith("reward/") else None
    return key if role is None else f"{key} ({role.replace('_', ' ')})"


def write_images(base: Measured, trained: Measured, folder: Path) -> None:
    """The first images of both, one file each, for the report: {base,trained}/<number of the prompt>.png."""
    for name, measured in (("base", base), ("trained", trained)):
        for index, image in enumerate(measured.images):
            write_picture(to_picture(image), folder / name / f"{index:04d}.png")


def before_after(base: Measured, trained: Measured) -> Any:
    """The suite's first prompts as drawn by both, framed by the strict verdict."""
    rows = list(zip(base.result.verdicts, trained.result.verdicts, strict=True))[:SHOWN]
    right = [(before.strict, after.strict) for before, after in rows]
    return picture([before.prompt for before, _ in rows], base.images, trained.images, right)
