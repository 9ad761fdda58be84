"""The files that cells keep for the next session beside their measurements: trained.json and cell.json.

See evaluate/kept_files.py for how they are read, and evaluate/kept_measurements.py for the measurements.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from agsm_rl.evaluate.kept_files import KeptFile


class Trained(KeptFile):
    """trained.json: the result of a cell's training. The first version had no `settings`, earlier ones no `starts`.

    `starts` are the settings that the cells which this one descends from were trained with, by name.
    """

    settings: dict[str, Any] | None = None
    starts: dict[str, dict[str, Any]] | None = None
    recipe: str
    steps: int = Field(ge=0)
    images: int | None
    seconds: float


class Score(KeptFile):
    """A score with its interval, whose bounds may be unknown."""

    value: float
    low: float | None
    high: float | None


class Figures(KeptFile):
    """A summary of a measurement, as in cell.json and sweep.json: `strict` and `overall`, or with suites `scores`."""

    split: str
    guidance: float
    num_images: int
    strict: float | None = None
    overall: float | None = None
    scores: dict[str, Score] | None = None


class Result(Trained):
    """cell.json of a finished cell: its training and all its measurements."""

    evaluations: list[Figures]
    base: list[Figures]
