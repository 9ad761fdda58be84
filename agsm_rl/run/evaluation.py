"""Base against trained on the same prompts and noise, at intervals in a run and at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from agsm_rl.files import write_text
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.rewards import directions
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.agreement import Agreement, agreements_to_json
from agsm_rl.run.checkpoint_writer import CheckpointWriter
from agsm_rl.run.evaluation_output import print_tables, summary, write_pictures
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.measurement import Compared, Measured, drawn_as, measure, to_json
from agsm_rl.run.records import EventsFile, MetricsFile
from agsm_rl.run.score_history import ScoreHistory
from agsm_rl.run.screen import make_console, tell
from agsm_rl.run.stop import Interrupted
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.anomalies import Event


class Evaluator(Callback):
    """Compares base and trained every `evaluate.every` steps and at the end; the only writer of eval.json.

    What is measured is what would be exported. `scores` keeps the best scores so far; when a rule of the recipe says
    so, the run ends after the step, and `ended` says why.

    Args:
        folder: Where eval.json, evaluations.jsonl and pictures go.
        recipe: The run's recipe.
        console: Where summaries are printed.
        check: Called before each batch of images; may raise Interrupted.
    """

    def __init__(
        self, folder: RunFolder, recipe: Recipe, console: Console, *, check: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.console, self.export, self.check = folder, console, recipe.export, check
        self.options = recipe.evaluate
        self.rewards = recipe.parts.evaluated_rewards(recipe.evaluate) if recipe.evaluate else {}
        self.roles = {name: "trained" if trained else "held_out" for name, trained in directions(recipe).items()}
        self.scores = ScoreHistory(recipe)
        self.events = EventsFile(folder.events, console)
        self.ended: Event | None = None
        """The rule that ended the run, if one did."""
        self.checkpoints = CheckpointWriter(folder, recipe, self.scores)
        self.file = MetricsFile(folder.evaluations)
        self._base: dict[float, Measured] = {}
        self._newest: tuple[int, list[Compared]] | None = None

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Evaluate when it is due; after the last step `finish` does it."""
        if self._due(step) and step < trainer.steps and not trainer.stopping:
            self._evaluate_or_stop(trainer)

    def resume(self, trainer: Trainer, state: Mapping[str, Any] | None) -> None:
        """Restore the score history (None: the checkpoint has none), and repeat an interrupted evaluation."""
        if state is not None and not self.scores.load_state_dict(state):
            tell(self.console, "evaluate: its settings have changed, so the search for the best score starts over")
        self.checkpoints.restore_best(trainer)
        if self._due(trainer.step) and trainer.step < trainer.steps and self.scores.newest != trainer.step:
            # With several guidances, some lines may have been written already.
            self.file.cut(trainer.step - 1)
            self._evaluate_or_stop(trainer)
        else:
            self._obey(trainer, [event for event in self.scores.events() if event.action == "stop"])

    def _due(self, step: int) -> bool:
        return bool(self.options and self.options.every and step and step % self.options.every == 0)

    def _evaluate_or_stop(self, trainer: Trainer) -> None:
        """Evaluate; if a signal interrupts it, the run stops, and the evaluation is repeated on resuming."""
        try:
            compared = self.measure(trainer)
        except Interrupted:
            trainer.stopping = True
            return
        for base, trained in compared:
            tell(self.console, summary(base, trained, trainer.step, self.roles))
        self._obey(trainer, self._note(trainer, compared))
        self.checkpoints.after_evaluation(trainer)

    def _note(self, trainer: Trainer, compared: list[Compared]) -> list[Event]:
        base, trained = compared[0]
        self.scores.note_base(base.means(), base.scores)
        return self.scores.note(trainer.step, trained.means(), trained.scores)

    def _obey(self, trainer: Trainer, events: list[Event]) -> None:
        for event in events:
            self.events.add(event)
            if event.action == "stop":
                trainer.stopping, self.ended = True, event

    def finish(self, trainer: Trainer, agreed: list[Agreement]) -> None:
        """The last evaluation, its tables and pictures; Interrupted if a signal interrupts it.

        `agreed` is what the terms' gradients said of each other over the run, for eval.json.
        """
        if self.options is None:
            return
        if self._newest is None or self._newest[0] != trainer.step:
            events = self._note(trainer, self.measure(trainer))
            for event in [] if self.ended else events:
                # The run has ended: there is nothing left to stop.
                self.events.add(replace(event, action="warn"))
            self.checkpoints.after_evaluation(trainer)
        assert self._newest is not None
        compared = self._newest[1]
        self._write(self.options, trainer.step, compared, agreed)
        print_tables(compared, self.options, self.roles, make_console())
        write_pictures(compared, self.folder.samples)

    def measure(self, trainer: Trainer) -> list[Compared]:
        """Base and trained at each guidance; recorded in the folder and by the trackers."""
        assert self.options is not None
        self.file.cut(trainer.step - 1)
        compared = []
        for guidance in self.options.guidance:
            if guidance not in self._base:
                with trainer.policy.switched_off():
                    self._base[guidance] = self._measure(trainer, self.options, guidance)
            with trainer.policy.exported(self.export), drawn_as(trainer.policy.adapters.values(), self.options):
                trained = self._measure(trainer, self.options, guidance)
            compared.append((self._base[guidance], trained))
            figures = trained.figures()
            self.file.add(trainer.step, {"guidance": guidance} | figures)
            logged = {f"eval/guidance_{guidance:g}/{self._logged(key)}": value for key, value in figures.items()}
            trainer.accelerator.log(logged, step=trainer.step)
        self._newest = (trainer.step, compared)
        self._write(self.options, trainer.step, compared)
        return compared

    def _measure(self, trainer: Trainer, options: Evaluate, guidance: float) -> Measured:
        return measure(trainer.policy.backbone, options, guidance, self.rewards, check=self.check)

    def _logged(self, key: str) -> str:
        """`reward/x` as `reward_held_out/x` or `reward_trained/x`."""
        name = key.removeprefix("reward/")
        return key if name == key else f"reward_{self.roles[name]}/{name}"

    def _write(
        self, options: Evaluate, step: int, compared: list[Compared], agreed: list[Agreement] | None = None
    ) -> None:
        """eval.json of the newest evaluation."""
        content = to_json(compared, options, step=step)
        content |= {"reward_roles": self.roles} if self.roles else {}
        content |= {"best": self.scores.best()} if self.scores.best_by else {}
        content |= {"ended_by": self.ended.to_json()} if self.ended else {}
        content |= {"agreement": agreements_to_json(agreed)} if agreed else {}
        write_text(self.folder.eval, json.dumps(content, indent=1) + "\n")
