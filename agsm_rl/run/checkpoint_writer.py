"""When a run writes a checkpoint, and the exported adapters that go with it: adapter/ and adapter-best/."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError

from agsm_rl.errors import UserError
from agsm_rl.export.attach import BASE_OPTIONS, find_exports, read_export, save_adapters
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run import checkpoints
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.records import flush
from agsm_rl.run.score_history import ScoreHistory
from agsm_rl.trainer import Callback, Trainer


class CheckpointWriter(Callback):
    """A checkpoint every `checkpoint.every` steps and at the end, and in adapter/ the adapters of the newest one.

    adapter-best/ holds the adapters of the best evaluation so far, whose checkpoint is kept. A state that is not finite
    is neither kept nor exported.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, scores: ScoreHistory) -> None:
        self.folder, self.recipe, self.scores = folder, recipe, scores
        self._saved: int | None = None
        self._due = False

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Save when it is due or the run is stopping; postponed while the run cannot be resumed from the step."""
        self._due = self._due or step % self.recipe.checkpoint.every == 0 or trainer.stopping
        if self._due and trainer.can_pause:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the end of the run."""
        if self._saved != trainer.step:
            self.save(trainer)

    def after_evaluation(self, trainer: Trainer) -> None:
        """Save an evaluation's scores into the checkpoint of its step, and in any case a new best one."""
        if trainer.step in (self._saved, self.scores.best_step) or trainer.stopping:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of the trainer's step, and the adapters."""
        trainer.check_finite()
        folder = self.folder
        for file in (folder.metrics, folder.evaluations, folder.image_scores, folder.events):
            flush(file)  # no checkpoint is ahead of what was recorded
        best = self.scores.best_step
        state = trainer.state_dict() | {"standing": self.scores.state_dict()}
        checkpoints.save(self.folder.checkpoints, trainer.step, state, keep=self.recipe.checkpoint.keep, best=best)
        self._export(trainer.policy, self.folder.adapter, trainer.step)
        if best == trainer.step:
            self._export_best(trainer.policy, best)
        self._saved, self._due = trainer.step, False

    def restore_best(self, trainer: Trainer) -> None:
        """Write adapter-best/ from its checkpoint if a kill came between the two; UserError if that is gone."""
        best = self.scores.best_step
        if best is None or _step_of_export(self.folder.best_adapter) == best:
            return
        state = checkpoints.of_step(self.folder.checkpoints, best)
        if state is None:
            raise UserError(
                f"{self.folder.best_adapter}: the best evaluation so far was at step {best}, but its adapters and its "
                "checkpoint are gone; to resume without it: --set checkpoint.best=null"
            )
        now = trainer.policy.state_dict()
        try:
            trainer.policy.load_state_dict(state["policy"])
            self._export_best(trainer.policy, best)
        finally:
            trainer.policy.load_state_dict(now)

    def _export_best(self, policy: Policy, step: int) -> None:
        """Write the folder aside and rename it, so that it never holds adapters of two steps."""
        target = self.folder.best_adapter
        aside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
        for left_over in (aside, old):
            shutil.rmtree(left_over, ignore_errors=True)
        self._export(policy, aside, step)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _export(self, policy: Policy, folder: Path, step: int) -> None:
        backbone = self.recipe.backbone
        metadata = {
            "checkpoint": str(backbone.options.get("checkpoint", "")),
            "backbone": backbone.use,
            "backbone_options": json.dumps({key: backbone.options.get(key) for key in BASE_OPTIONS}),
            "objectives": json.dumps([term.use for term in self.recipe.objectives]),
            "recipe_sha256": hashlib.sha256(self.recipe.to_yaml().encode()).hexdigest(),
            "step": str(step),
            "weights": self.recipe.export,
        }
        try:
            with policy.exported(self.recipe.export):
                save_adapters(policy.adapters, folder, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise checkpoints.unwritten(folder, self.folder.checkpoints, error) from error


def _step_of_export(folder: Path) -> int | None:
    """The step of exported adapters; None if there are none, or they are damaged."""
    try:
        return int(read_export(find_exports(folder)[0])[1]["step"])
    except (UserError, KeyError, ValueError):
        return None
