"""The evaluations of a cell, each saved as soon as it is made, and those of the base, which all cells of a sweep share.

The base is measured once for each combination of settings (backbone, suite, split, images, seed, steps, guidance,
suffix). The first cell that needs it measures it; others wait for that cell and read its file.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image
from skimage.util import img_as_float32
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import to_picture, write_picture
from agsm_rl.evaluate.suites.shapes import ShapesResult, compare
from agsm_rl.export.attach import Handle, attach
from agsm_rl.files import check_regular, write_text
from agsm_rl.policy import check_bank
from agsm_rl.recipe.build import build_backbone
from agsm_rl.recipe.earlier import block_of_today, evaluation_of_today
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block, Evaluate
from agsm_rl.run.agreement import agreements, agreements_to_json
from agsm_rl.run.evaluation_output import write_pictures
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.measurement import Measured, drawn_as, measure, to_json
from agsm_rl.sweep.kept import Measurement, read_kept, warn_damaged

WITHOUT_EFFECT = {"device", "gradient_checkpointing"}
"""Options of a backbone that do not change the images it draws."""


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

    def write(self, options: Evaluate, name: str, *, step: int, pictures: bool) -> list[dict[str, Any]]:
        """Measure base and trained model at each guidance, write the run folder's file `name`, return the figures."""
        trained = [
            self._kept(self.folder.path / "evals", self.model_id, options, g, adapted=True) for g in options.guidance
        ]
        base = [self._base(options, guidance) for guidance in options.guidance]
        compared = list(zip(base, trained, strict=True))
        content = to_json(compared, options, step=step)
        agreed = agreements(self.folder.metrics)
        content |= {"agreement": agreements_to_json(agreed)} if agreed else {}
        write_text(self.folder.path / name, json.dumps(content, indent=1) + "\n")
        if pictures:
            write_pictures(compared, self.folder.samples)
        model = {"backbone": self.recipe.backbone.options.get("checkpoint")}
        self.base_figures += [model | figures(measured, options) for measured in base]
        file = f"cells/{self.folder.path.name}/{name}"
        return [figures(after, options, before) | {"file": file} for before, after in compared]

    def _base(self, options: Evaluate, guidance: float) -> Measured:
        return self._kept(self.base, _backbone_settings(self.recipe.backbone), options, guidance, adapted=False)

    def _kept(
        self, folder: Path, model: str | list[Any], options: Evaluate, guidance: float, *, adapted: bool
    ) -> Measured:
        """The measurement with these settings, read from its file if that exists and is intact."""
        settings = {"model": model, "how": _evaluation_settings(options, guidance, adapted=adapted)}
        text = model if isinstance(model, str) else json.dumps(model, sort_keys=True)
        key = hashlib.sha256(json.dumps([text, settings["how"]], sort_keys=True).encode()).hexdigest()[:12]
        file = folder / f"{options.split}-guidance{guidance:g}-{key}.json"
        folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if adapted else FileLock(file.with_suffix(".lock")):
            kept = _read(file, guidance) or self._measured_by_earlier_version(file, settings, guidance, adapted=adapted)
            if kept is not None:
                return kept
            print(f"{'trained' if adapted else 'base'}: {options.split}, guidance {guidance:g}", flush=True)
            measured = self._measure(options, guidance, adapted=adapted)
            for index, image in enumerate(measured.images):
                write_picture(to_picture(image), _pictures(file) / f"{index:04d}.png")
            write_text(file, json.dumps({"settings": settings} | measured.to_json()) + "\n")
            return measured

    def _measured_by_earlier_version(
        self, file: Path, now: dict[str, Any], guidance: float, *, adapted: bool
    ) -> Measured | None:
        """A measurement of an earlier version: its settings lack newer options, but mean the same."""
        for earlier in sorted(file.parent.glob(f"{file.name.rpartition('-')[0]}-*.json")):
            then = read_kept(earlier, Measurement).get("settings")
            if earlier != file and then is not None and self._of_today(then, adapted=adapted) == now:
                return _read(earlier, guidance)
        return None

    def _of_today(self, then: dict[str, Any], *, adapted: bool) -> dict[str, Any] | None:
        """What a file's settings mean in this version; None if they use names that it lacks, or are not settings."""
        try:
            options, model = evaluation_of_today(then["how"], self.recipe.parts), then["model"]
            if not adapted:
                use, given = model
                model = _backbone_settings(block_of_today("backbones", {"use": use} | given, self.recipe.parts))
        except (UserError, KeyError, TypeError, ValueError):
            return None
        return {"model": model, "how": _evaluation_settings(options, options.guidance[0], adapted=adapted)}

    def _measure(self, options: Evaluate, guidance: float, *, adapted: bool) -> Measured:
        backbone = self._model(adapted=adapted)
        adapters = self._handle.adapters.values() if self._handle else ()
        if adapted:
            check_bank(options.bank, adapters, where=f"{self.folder.recipe}: evaluate.bank")
        with drawn_as(adapters, options, where=f"{self.folder.recipe}: evaluate."):
            return measure(backbone, options, guidance, self.recipe.parts.evaluated_rewards(options))

    def _model(self, *, adapted: bool) -> Any:
        """The backbone with or without the run's adapters; it is loaded when it is first needed."""
        if self._backbone is None:
            self._backbone = build_backbone(self.recipe.backbone, parts=self.recipe.parts)
        if adapted and self._handle is None:
            self._handle = attach(self._backbone.pipeline, self.folder.path)
        elif not adapted and self._handle is not None:
            self._handle.detach()
            self._handle = None
        return self._backbone


def _backbone_settings(backbone: Block) -> list[Any]:
    """The backbone's name and those of its options that affect its images."""
    return [backbone.use, {key: value for key, value in backbone.options.items() if key not in WITHOUT_EFFECT}]


def _evaluation_settings(options: Evaluate, guidance: float, *, adapted: bool) -> dict[str, Any]:
    """The settings of an evaluation that affect its result at one guidance."""
    left_out = {"guidance", "every", "batch_size"}
    if not adapted or options.bank == "positive":
        left_out.add("bank")  # the base has none, and the positive one is the default
    if not adapted:
        left_out |= {"guidance_bank", "guidance_prompt"}
    return options.model_dump(mode="json", exclude=left_out) | {"guidance": guidance}


def figures(measured: Measured, options: Evaluate, base: Measured | None = None) -> dict[str, Any]:
    """A summary of a measurement, as in sweep.json; `difference` is trained minus base in the strict score, paired."""
    short: dict[str, Any] = {"split": options.split, "guidance": measured.guidance}
    short |= {"num_images": len(measured.result.verdicts)}
    for name, strict in (("strict", True), ("overall", False)):
        score = measured.result.scores(strict=strict).overall
        short |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    if measured.rewards:
        short["rewards"] = measured.rewards
    if base is not None:
        change = compare(base.result, measured.result).strict.overall
        short["difference"] = {"value": change.value, "low": change.low, "high": change.high}
    return short


def _pictures(file: Path) -> Path:
    """The folder of a measurement's images."""
    return file.with_suffix("")


def _read(file: Path, guidance: float) -> Measured | None:
    """The measurement in a file; None if there is no file, or if it or one of its images is damaged."""
    content = read_kept(file, Measurement)
    if not content:
        return None
    try:
        result = ShapesResult.from_json(content)
        images = [_read_picture(picture) for picture in sorted(_pictures(file).glob("*.png"))]
        return Measured(guidance, result, content["rewards"], torch.stack(images))
    except (UserError, OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        # PIL raises a SyntaxError for a broken PNG; stacking fails if there are no images, or their sizes differ.
        warn_damaged(file, f"{type(error).__name__}: {error}")
        return None


def _read_picture(path: Path) -> Tensor:
    check_regular(path)
    with Image.open(path) as picture:
        return torch.from_numpy(img_as_float32(picture.convert("RGB"))).permute(2, 0, 1)
