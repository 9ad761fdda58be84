"""Base against trained on the same prompts and noise, at intervals in a run and at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from agsm_rl.backbones.text_cache import text_cache_of
from agsm_rl.evaluate.batch_size import BatchSizes
from agsm_rl.evaluate.intervals import Interval
from agsm_rl.evaluate.kept_base import KeptBase
from agsm_rl.evaluate.measure import encode_prompts
from agsm_rl.evaluate.measured import (
    Compared,
    Entry,
    Measured,
    drawing_settings,
    drawn_as,
    entries_of,
    measure,
    to_json,
)
from agsm_rl.files import write_text
from agsm_rl.interfaces import Backbone
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.rewards import directions
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.agreement import Agreement, agreements_to_json
from agsm_rl.run.checkpoint_writer import CheckpointWriter
from agsm_rl.run.evaluation_output import Suites, print_tables, summary, write_pictures
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.image_scores import ImageScoresFile, changes, image_scores
from agsm_rl.run.records import EventsFile, MetricsFile, read_lines
from agsm_rl.run.score_history import START, ScoreHistory
from agsm_rl.run.screen import make_console, tell
from agsm_rl.run.stop import Interrupted
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.anomalies import Event
from agsm_rl.training.stages import stage


class Evaluator(Callback):
    """Compares base and trained every `evaluate.every` steps and at the end; the only writer of eval.json.

    All processes of a run have one and draw a share each; all have the same figures, and the main one writes them.
    What is measured is what would be exported. `scores` keeps the best scores so far; when a rule of the recipe says
    so, the run ends after the step, and `ended` says why.

    Args:
        folder: Where eval.json, evaluations.jsonl and pictures go.
        recipe: The run's recipe.
        console: Where summaries are printed.
        check: Called before each batch of images; may raise Interrupted.
        is_main: Whether this process writes and prints.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        console: Console,
        *,
        check: Callable[[], None] = lambda: None,
        is_main: bool = True,
    ) -> None:
        self.folder, self.console, self.export, self.check = folder, console, recipe.export, check
        self.options, self.is_main = recipe.evaluate, is_main
        self.entries: list[Entry] = entries_of(recipe.evaluate, recipe.parts) if recipe.evaluate else []
        self.roles = {name: "trained" if trained else "held_out" for name, trained in directions(recipe).items()}
        self.scores = ScoreHistory(recipe)
        self.events = EventsFile(folder.events, console)
        self.ended: Event | None = None
        """The rule that ended the run, if one did."""
        self.checkpoints = CheckpointWriter(folder, recipe, self.scores)
        self.file = MetricsFile(folder.evaluations)
        self.images = ImageScoresFile(folder.image_scores, kept=len(recipe.objectives) > 1)
        self._base: dict[tuple[str, float], Measured] = {}
        self._kept_base = KeptBase(recipe.backbone, recipe.parts, tell=self._tell, check=check)
        self._batch_sizes = BatchSizes(recipe.backbone, recipe.parts)
        self._newest: tuple[int, dict[str, list[Compared]]] | None = None

    def prepare(self, backbone: Backbone) -> None:
        """Try what judges, before hours are spent on training."""
        if self.options is not None:
            prepare_suites(self.entries, self.options, backbone)

    def encode_prompts(self, trainer: Trainer) -> None:
        """Encode the prompts before the first step, where the text encoders do not stay loaded."""
        if self.options is None or text_cache_of(trainer.policy.backbone) is None:
            return
        for entry in self.entries:
            with stage(f"encoding the prompts of the suite {entry.name}"):
                for guidance in self.options.guidance:
                    how = drawing_settings(self._sized(trainer, self.options, entry, guidance), guidance)
                    encode_prompts(trainer.policy.backbone, entry.made.suite, how, processes=trainer.processes)

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Evaluate when it is due; after the last step `finish` does it."""
        if self._due(step) and step < trainer.steps and not self._any_stops(trainer):
            self._evaluate_or_stop(trainer)

    def resume(self, trainer: Trainer, state: Mapping[str, Any] | None) -> None:
        """Restore the score history (None: the checkpoint has none), and repeat an interrupted evaluation."""
        if state is not None and not self.scores.load_state_dict(state):
            measured_again = self._due(trainer.step) or trainer.step >= trainer.steps
            self.scores.comparable_from = trainer.step + (not measured_again)
            message = "evaluate: its settings have changed, so the search for the best score starts over"
            self._tell(message, important=True)
        if self.is_main:
            self.checkpoints.restore_best(trainer)
        trainer.processes.wait()
        if self._due(trainer.step) and trainer.step < trainer.steps and self.scores.newest != trainer.step:
            self._evaluate_or_stop(trainer)
        else:
            self._obey(trainer, [event for event in self.scores.events() if event.action == "stop"])

    def _due(self, step: int) -> bool:
        return bool(self.options and self.options.every and step and step % self.options.every == 0)

    @staticmethod
    def _any_stops(trainer: Trainer) -> bool:
        """Whether any process was told to stop: a signal may have reached one only, and all must agree."""
        return bool(trainer.processes.numbers(float(trainer.stopping)).any())

    def _evaluate_or_stop(self, trainer: Trainer) -> None:
        """Evaluate; if a signal interrupts it, the run stops, and the evaluation is repeated on resuming."""
        try:
            suites = self.measure(trainer)
        except Interrupted:
            trainer.stopping = True
            return
        for compared in suites.values():
            for base, trained in compared:
                self._tell(summary(base, trained, trainer.step, self.roles), prose=True)
        self._obey(trainer, self._note(trainer, suites))
        if self.is_main:
            self.checkpoints.after_evaluation(trainer)

    def _note(self, trainer: Trainer, suites: Suites) -> list[Event]:
        """The scores at the first guidance, by which the rules go."""
        base, trained = ([compared[0][model] for compared in suites.values()] for model in (0, 1))
        self.scores.note_base(*_joined(base))
        return self.scores.note(trainer.step, *_joined(trained))

    def _obey(self, trainer: Trainer, events: list[Event]) -> None:
        for event in events:
            if self.is_main:
                self.events.add(event)
            if event.action == "stop":
                trainer.stopping, self.ended = True, event

    def finish(self, trainer: Trainer, agreed: list[Agreement]) -> None:
        """The last evaluation, its tables and pictures; Interrupted if a signal interrupts it.

        `agreed` is what the terms' gradients said of each other over the run, for eval.json.
        """
        if self.options is None:
            return
        if self._newest is None or self._newest[0] != trainer.step or any(e.made.final_only for e in self.entries):
            events = self._note(trainer, self.measure(trainer, final=True))
            for event in [] if self.ended or not self.is_main else events:
                # The run has ended: there is nothing left to stop.
                self.events.add(replace(event, action="warn"))
            if self.is_main:
                self.checkpoints.after_evaluation(trainer)
        assert self._newest is not None
        suites = self._newest[1]
        if self.is_main:
            self._write(self.options, trainer.step, suites, agreed)
            print_tables(suites, self.options, self.roles, make_console())
            write_pictures(suites, self.folder.samples)

    def scores_by_step(self) -> dict[int, dict[str, float]]:
        """All comparable evaluations' finite figures at the first guidance, by their steps; 0: the base's.

        A run that did not start as the base has none for 0.
        """
        if self.options is None or self._newest is None:
            return {}
        found: dict[int, dict[str, float]] = {}
        for (base, _), *_others in self._newest[1].values() if self.scores.starts_as_base else ():
            place = "" if base.entry.made.alone else f"{base.entry.name}/"
            found.setdefault(START, {}).update({place + key: value for key, value in base.figures().items()})
        for row in read_lines(self.folder.evaluations):
            if row.get("guidance") == self.options.guidance[0] and row["step"] >= self.scores.comparable_from:
                place = f"{row['suite']}/" if "suite" in row else ""
                figures = {key: value for key, value in row.items() if key not in ("step", "guidance", "suite")}
                found.setdefault(row["step"], {}).update({place + key: value for key, value in figures.items()})
        return {
            step: {key: value for key, value in figures.items() if value is not None and math.isfinite(value)}
            for step, figures in found.items()
        }

    def changes(self, begin: int, end: int) -> dict[str, Interval]:
        """How much scores changed between two of these steps, paired; only those whose images' are known at both."""
        newest, suites = self._newest or (START, {})
        found: dict[str, Interval] = {}
        for name, ((base, trained), *_others) in suites.items():
            names = trained.figures()
            known = self.images.of(name) | {START: image_scores(base, names), newest: image_scores(trained, names)}
            place = "" if base.entry.made.alone else f"{name}/"
            moved = changes(trained, known.get(begin, {}), known.get(end, {}))
            found |= {place + key: change for key, change in moved.items()}
        return found

    def measure(self, trainer: Trainer, *, final: bool = False) -> dict[str, list[Compared]]:
        """Base and trained on each suite at each guidance; recorded in the folder and by the trackers.

        At the end of the run, suites that have just been measured after its last step are not measured again.
        """
        assert self.options is not None
        known = self._newest[1] if final and self._newest and self._newest[0] == trainer.step else {}
        if self.is_main:
            # With several guidances or suites, some lines may have been written already.
            last = trainer.step if known else trainer.step - 1
            self.file.cut(last)
            self.images.cut(last)
        suites: dict[str, list[Compared]] = {}
        for entry in self.entries:
            if entry.name in known:
                suites[entry.name] = known[entry.name]
            elif final or not entry.made.final_only:
                suites[entry.name] = [self._compare(trainer, entry, guidance) for guidance in self.options.guidance]
        if not suites:
            return suites
        self._newest = (trainer.step, suites)
        if self.is_main:
            self._write(self.options, trainer.step, suites)
        return suites

    def _compare(self, trainer: Trainer, entry: Entry, guidance: float) -> Compared:
        assert self.options is not None
        options = self._sized(trainer, self.options, entry, guidance)
        base = self._base_of(trainer, options, entry, guidance)
        with trainer.policy.exported(self.export), drawn_as(trainer.policy.adapters.values(), options):
            trained = self._measure(trainer, options, entry, guidance, f"step {trainer.step}")
        figures, place = trained.figures(), f"eval/guidance_{guidance:g}"
        if self.is_main:
            name = {} if entry.made.alone else {"suite": entry.name}
            self.file.add(trainer.step, {"guidance": guidance, **name, **figures})
            if guidance == options.guidance[0]:
                self.images.add(trainer.step, trained, figures)
        if not entry.made.alone:
            place = f"eval/{entry.name}/guidance_{guidance:g}"
        logged = {f"{place}/{self._logged(entry, key)}": value for key, value in figures.items()}
        trainer.accelerator.log(logged, step=trainer.step)
        return base, trained

    def _sized(self, trainer: Trainer, options: Evaluate, entry: Entry, guidance: float) -> Evaluate:
        """The evaluation with the number of images that are drawn at once."""
        size = self._batch_sizes.choose(options, trainer.policy.backbone, entry, guidance, trainer.processes)
        return options.model_copy(update={"batch_size": size})

    def _base_of(self, trainer: Trainer, options: Evaluate, entry: Entry, guidance: float) -> Measured:
        """The base's measurement, which depends on the base and the evaluation only; made or read once per run."""
        key = (entry.name, guidance)
        if key not in self._base:

            def measure() -> Measured:
                with trainer.policy.switched_off():
                    return self._measure(trainer, options, entry, guidance, "base")

            self._base[key] = self._kept_base.measured(
                trainer.policy.backbone, entry, options, guidance, measure, processes=trainer.processes
            )
        return self._base[key]

    def _measure(self, trainer: Trainer, options: Evaluate, entry: Entry, guidance: float, model: str) -> Measured:
        place = "" if entry.made.alone else f" on {entry.name}"
        what, count = f"evaluating {model}{place}: guidance {guidance:g}", trainer.processes.count
        with stage(what, total=entry.made.suite.num_images, unit="images", announce=True) as advance:
            return measure(
                trainer.policy.backbone,
                entry,
                options,
                guidance,
                processes=trainer.processes,
                check=self.check,
                advance=lambda number: advance(number * count),  # the other processes are about as far
            )

    def _logged(self, entry: Entry, figure: str) -> str:
        """`reward/x` as `reward_held_out/x` or `reward_trained/x`."""
        name = figure.removeprefix("reward/")
        return figure if name == figure else f"reward_{self.roles[entry.made.key(name)]}/{name}"

    def _tell(self, message: str, *, important: bool = False, prose: bool = False) -> None:
        if self.is_main:
            tell(self.console, message, important=important, prose=prose)

    def _write(self, options: Evaluate, step: int, suites: Suites, agreed: list[Agreement] | None = None) -> None:
        """eval.json of the newest evaluation."""
        content = to_json(suites, options, step=step)
        content |= {"reward_roles": self.roles} if self.roles else {}
        content |= {"best": self.scores.best()} if self.scores.best_by else {}
        content |= {"ended_by": self.ended.to_json()} if self.ended else {}
        content |= {"agreement": agreements_to_json(agreed)} if agreed else {}
        write_text(self.folder.eval, json.dumps(content, indent=1) + "\n")


def prepare_suites(entries: Sequence[Entry], options: Evaluate, backbone: Backbone) -> None:
    """Read the prompts of an evaluation, and try what judges on a picture of the right size; UserError if it cannot."""
    for entry in entries:
        with stage(f"preparing the suite {entry.name}"):
            entry.prepare(backbone, options)


def _joined(measured: list[Measured]) -> tuple[dict[str, float], dict[str, Any]]:
    """The means and the figures of each image of several suites."""
    means = {name: value for item in measured for name, value in item.means().items()}
    return means, {name: value for item in measured for name, value in item.per_image().items()}
