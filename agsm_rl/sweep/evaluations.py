"""The evaluations of a cell, each saved as soon as it is made, and those of the base, which all cells of a sweep share.

The base is measured once for each combination of settings (backbone, suite, images, seed, steps, guidance, suffix). The
first cell that needs it measures it; others wait for that cell and read its file.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from agsm_rl.errors import UserError
from agsm_rl.evaluate.base_settings import WITHOUT_EFFECT
from agsm_rl.evaluate.batch_size import BatchSizes
from agsm_rl.evaluate.intervals import Interval
from agsm_rl.evaluate.kept_base import KeptBase
from agsm_rl.evaluate.kept_measurements import (
    measurement_file,
    read_measurement,
    same_label,
    settings_in,
    write_measurement,
)
from agsm_rl.evaluate.measured import Compared, Entry, Measured, drawn_as, entries_of, measure, to_json
from agsm_rl.evaluate.progress import progress
from agsm_rl.export.attach import Handle, attach_to_backbone
from agsm_rl.files import write_text
from agsm_rl.policy import check_bank
from agsm_rl.recipe.build import build_backbone
from agsm_rl.recipe.earlier import block_of_today, evaluation_of_today
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block, Evaluate
from agsm_rl.run.agreement import agreements, agreements_to_json
from agsm_rl.run.evaluation_output import write_pictures
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.records import read_lines


class CellEvaluations:
    """Measures a cell's trained model and its base.

    Args:
        folder: The cell's run folder.
        recipe: The recipe that was trained.
        base: The folder of the base's measurements, which all cells of the sweep share.
        model_id: Distinguishes this training from another of the same cell.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, *, base: Path, model_id: str) -> None:
        self.folder, self.recipe, self.base, self.model_id = folder, recipe, base, model_id
        self.base_figures: list[dict[str, Any]] = []
        self._backbone: Any = None
        self._handle: Handle | None = None
        self._batch_sizes = BatchSizes(recipe.backbone, recipe.parts)
        self._kept_base = KeptBase(recipe.backbone, recipe.parts, tell=partial(print, flush=True))

    def write(self, options: Evaluate, name: str, *, step: int, pictures: bool) -> list[dict[str, Any]]:
        """Measure base and trained model at each guidance, write the run folder's file `name`, return the figures."""
        entries = entries_of(options, self.recipe.parts)
        cells, model = self.folder.path / "evals", _backbone_settings(self.recipe.backbone)
        trained = {
            entry.name: [self._kept(cells, self.model_id, entry, options, g, adapted=True) for g in options.guidance]
            for entry in entries
        }
        base = {
            entry.name: [self._kept(self.base, model, entry, options, g, adapted=False) for g in options.guidance]
            for entry in entries
        }
        suites = {suite: list(zip(base[suite], trained[suite], strict=True)) for suite in trained}
        content = to_json(suites, options, step=step)
        agreed = agreements(read_lines(self.folder.metrics))
        content |= {"agreement": agreements_to_json(agreed)} if agreed else {}
        write_text(self.folder.path / name, json.dumps(content, indent=1) + "\n")
        if pictures:
            write_pictures(suites, self.folder.samples)
        checkpoint = {"backbone": self.recipe.backbone.options.get("checkpoint")}
        at = [[compared[place] for compared in suites.values()] for place in range(len(options.guidance))]
        self.base_figures += [checkpoint | figures(compared, options, trained=False) for compared in at]
        file = f"cells/{self.folder.path.name}/{name}"
        return [figures(compared, options, trained=True) | {"file": file} for compared in at]

    def _kept(
        self,
        folder: Path,
        model: str | list[Any],
        entry: Entry,
        options: Evaluate,
        guidance: float,
        *,
        adapted: bool,
    ) -> Measured:
        """The measurement with these settings, read from its file if that exists and is intact."""
        settings = {"model": model, "how": _evaluation_settings(options, entry, guidance, adapted=adapted)}
        text = model if isinstance(model, str) else json.dumps(model, sort_keys=True)
        label = options.split if entry.made.alone else f"{options.split}-{entry.name}"
        file = measurement_file(folder, label, guidance, text, settings["how"])
        folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if adapted else FileLock(file.with_suffix(".lock")):
            kept = read_measurement(file, entry, guidance)
            kept = kept or self._measured_by_earlier_version(file, settings, entry, guidance, adapted=adapted)
            if kept is not None:
                return kept
            print(f"{'trained' if adapted else 'base'}: {label}, guidance {guidance:g}", flush=True)
            measured = self._made(options, entry, guidance, adapted=adapted)
            write_measurement(file, settings, measured)
            return measured

    def _made(self, options: Evaluate, entry: Entry, guidance: float, *, adapted: bool) -> Measured:
        """A measurement that the sweep has not; the base's may be in the cache that runs share."""
        backbone = self._model(adapted=adapted)
        size = self._batch_sizes.choose(options, backbone, entry, guidance)
        options = options.model_copy(update={"batch_size": size})
        measure = partial(self._measure, options, entry, guidance, adapted=adapted)
        return measure() if adapted else self._kept_base.measured(backbone, entry, options, guidance, measure)

    def _measured_by_earlier_version(
        self, file: Path, now: dict[str, Any], entry: Entry, guidance: float, *, adapted: bool
    ) -> Measured | None:
        """A measurement of an earlier version: its settings lack newer options, but mean the same."""
        for earlier in same_label(file):
            then = settings_in(earlier)
            if then is not None and self._of_today(then, entry, adapted=adapted) == now:
                return read_measurement(earlier, entry, guidance)
        return None

    def _of_today(self, then: dict[str, Any], entry: Entry, *, adapted: bool) -> dict[str, Any] | None:
        """What a file's settings mean in this version; None if they use names that it lacks, or are not settings."""
        try:
            options, model = evaluation_of_today(then["how"], self.recipe.parts), then["model"]
            if not adapted:
                use, given = model
                model = _backbone_settings(block_of_today("backbones", {"use": use} | given, self.recipe.parts))
            how = _evaluation_settings(options, entry, options.guidance[0], adapted=adapted)
        except (UserError, KeyError, TypeError, ValueError):
            return None
        return {"model": model, "how": how}

    def _measure(self, options: Evaluate, entry: Entry, guidance: float, *, adapted: bool) -> Measured:
        backbone = self._model(adapted=adapted)
        adapters = self._handle.adapters.values() if self._handle else ()
        if adapted:
            check_bank(options.bank, adapters, where=f"{self.folder.recipe}: evaluate.bank")
        place = "" if entry.made.alone else f" on {entry.name}"
        what = f"evaluating {'trained' if adapted else 'base'}{place}: guidance {guidance:g}"
        with (
            drawn_as(adapters, options, where=f"{self.folder.recipe}: evaluate."),
            progress(what, total=entry.made.suite.num_images) as advance,
        ):
            return measure(backbone, entry, options, guidance, advance=advance)

    def _model(self, *, adapted: bool) -> Any:
        """The backbone with or without the run's adapters; it is loaded when it is first needed."""
        if self._backbone is None:
            self._backbone = build_backbone(self.recipe.backbone, parts=self.recipe.parts)
        if adapted and self._handle is None:
            allowed = self.recipe.parts.allow_imports
            self._handle = attach_to_backbone(self._backbone, self.folder.path, allow_imports=allowed)
        elif not adapted and self._handle is not None:
            self._handle.detach()
            self._handle = None
        return self._backbone


def _backbone_settings(backbone: Block) -> list[Any]:
    """The backbone's name and those of its options that affect its images."""
    return [backbone.use, {key: value for key, value in backbone.options.items() if key not in WITHOUT_EFFECT}]


def _evaluation_settings(options: Evaluate, entry: Entry, guidance: float, *, adapted: bool) -> dict[str, Any]:
    """The settings of an evaluation that affect a suite's result at one guidance."""
    left_out = {"guidance", "every", "batch_size", "keep_base"}
    if not adapted or options.bank == "positive":
        left_out.add("bank")  # the base has none, and the positive one is the default
    if not adapted:
        left_out |= {"guidance_bank", "guidance_prompt"}
    settings = options.model_dump(mode="json", exclude=left_out) | {"guidance": guidance}
    if options.suites is not None:
        block = {key: value for key, value in settings["suites"][entry.name].items() if key != "final_only"}
        settings["suites"] = {entry.name: block}
    return settings


def figures(suites: list[Compared], options: Evaluate, *, trained: bool) -> dict[str, Any]:
    """A summary of the trained model or the base at one guidance, as in sweep.json.

    `difference` is trained minus base, paired: of the short form's strict score; of every suite in its own form.
    """
    first = suites[0][1] if trained else suites[0][0]
    short: dict[str, Any] = {"split": options.split, "guidance": first.guidance}
    short |= {"num_images": first.result.to_json()["num_images"]}
    if options.suites is None:
        for name in ("strict", "overall"):
            score = first.result.scores()[name]
            short |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        short |= {"rewards": first.rewards} if first.rewards else {}
        if trained:
            change = first.result.against(suites[0][0].result)["difference"]["strict"]["overall"]
            short["difference"] = {key: change[key] for key in ("value", "low", "high")}
        return short
    short["scores"] = {}
    for base, after in suites:
        measured = after if trained else base
        intervals = dict(measured.result.scores()) | (measured.reward_result.scores() if measured.reward_result else {})
        short["scores"] |= {measured.entry.made.key(name): _score(part) for name, part in intervals.items()}
    return short


def _score(part: Interval) -> dict[str, float | None]:
    bounds = {name: getattr(part, name) for name in ("low", "high")}
    return {"value": part.value} | {name: value if math.isfinite(value) else None for name, value in bounds.items()}
