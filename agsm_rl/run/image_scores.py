"""What each image was worth at an evaluation, and how the scores changed between two of them, with paired intervals.

The intervals are those of a report on this run: over requirements, because prompts that ask for the same thing resemble
each other. With prompts outside the drawn worlds they are over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agsm_rl.evaluate.intervals import Interval
from agsm_rl.evaluate.measured import Measured
from agsm_rl.report.eval_file import FAULTS
from agsm_rl.report.eval_rows import images_of, judged_of
from agsm_rl.report.requirements import requirements_of
from agsm_rl.run.records import MetricsFile, append_line, read_lines

ImageScores = Mapping[str, list[Any]]
"""A figure per image, true or false or a number, by the score's name in evaluations.jsonl."""


class ImageScoresFile:
    """image_scores.jsonl: the image scores of each evaluation at the first guidance, one line per suite.

    `kept`: whether the run keeps them; only parts that follow each other need more than eval.json holds.
    """

    def __init__(self, path: Path, *, kept: bool) -> None:
        self.path, self.kept = path, kept

    def cut(self, step: int) -> None:
        """Drop the lines after `step`."""
        if self.kept:
            MetricsFile(self.path).cut(step)

    def add(self, step: int, trained: Measured, names: Iterable[str]) -> None:
        """Append an evaluation; `names` are its scores'."""
        if self.kept:
            content = {"guidance": trained.guidance, "suite": trained.entry.name}
            append_line(self.path, {"step": step} | content | {"scores": image_scores(trained, names)})

    def of(self, suite: str) -> dict[int, ImageScores]:
        """A suite's lines by their steps."""
        return {row["step"]: row["scores"] for row in read_lines(self.path) if row["suite"] == suite}


def image_scores(measured: Measured, names: Iterable[str]) -> dict[str, list[Any]]:
    """What is known of each image of these scores; nothing where the suite's rows hold no figures."""
    try:
        values = judged_of(measured.to_json()).values
    except FAULTS:  # a user's suite may have rows of another form
        return {}
    # The lenient verdict is the drawn worlds' overall score.
    keys = {name: name.removeprefix("reward/") for name in names}
    keys = {name: "correct" if key == "overall" and key not in values else key for name, key in keys.items()}
    return {name: values[key].tolist() for name, key in keys.items() if key in values}


def changes(measured: Measured, before: ImageScores, after: ImageScores) -> dict[str, Interval]:
    """After minus before, paired, of each score that all images have at both ends; `measured` says what they are of."""
    if not after.keys() & before.keys():
        return {}
    from agsm_rl.report.compare import Layout, Quantity, estimate  # here: scipy takes most of a second

    content = measured.to_json()
    try:
        images = images_of(content)
    except FAULTS:
        return {}
    prompts, tags = [image.prompt for image in images], [image.tag for image in images]
    requirements = requirements_of(str(content.get("suite")), prompts) or prompts
    # A row counts as often as in the score: a prompt that is listed twice counts twice.
    layout = Layout(tags, list(dict.fromkeys(tags)), [str(image.row) for image in images], requirements)
    quantities = {}
    for name in after.keys() & before.keys():
        now, then = np.array(after[name]), np.array(before[name])
        if len(now) == len(then) == len(images):
            quantities[name] = Quantity(now[None], then[None], share=now.dtype == bool)
    found = {name: part.overall for name, part in estimate(quantities, layout).items()}
    return {name: part for name, part in found.items() if math.isfinite(part.low + part.high)}
