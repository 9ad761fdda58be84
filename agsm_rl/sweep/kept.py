"""The files that cells keep for the next session: trained.json, cell.json, and the measurements in evals/ and base/.

All are validated when they are read. A damaged file counts as missing: a warning is logged, and the file is made again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agsm_rl.errors import UserError
from agsm_rl.evaluate.suites.shapes import ImageVerdict
from agsm_rl.files import parse_json, read_text

log = logging.getLogger(__name__)


class _Kept(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


class Trained(_Kept):
    """trained.json: the result of a cell's training. The first version had no `settings`."""

    settings: dict[str, Any] | None = None
    recipe: str
    steps: int = Field(ge=0)
    images: int | None
    seconds: float


class Score(_Kept):
    """A score with its interval, whose bounds may be unknown."""

    value: float
    low: float | None
    high: float | None


class Figures(_Kept):
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


class Rows(_Kept):
    """A row of each image, by one of the suites that judged it."""

    prompt_index: int
    number: int
    metadata: dict[str, Any]
    row: Any


class JudgedMeasurement(_Kept):
    """A file of evals/ or base/: what a suite, and rewards beside it, say of each image at one guidance."""

    settings: dict[str, Any] | None = None
    judged: list[list[Rows]] = Field(min_length=1)


class Measurement(_Kept):
    """The same of an earlier version: the shapes suite's verdicts and mean rewards."""

    settings: dict[str, Any] | None = None
    suite: str
    images: list[ImageVerdict] = Field(min_length=1)
    rewards: dict[str, float]


def read_kept(file: Path, shape: type[_Kept], *, warn: bool = True) -> dict[str, Any]:
    """The content of such a file; empty if it is missing or damaged, which a warning says."""
    warned = warn_damaged if warn else lambda file, reason: None
    if not file.exists():
        return {}
    try:
        text = read_text(file)
        content: dict[str, Any] = parse_json(text, where=str(file))
        shape.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        warned(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": "))
        return {}
    except UserError as error:
        warned(file, str(error).removeprefix(f"{file}: "))
        return {}
    return content


def warn_damaged(file: Path, reason: str) -> None:
    """Warn that a file is damaged and therefore not used."""
    log.warning("%s: is damaged (%s), so it is made again", file, reason)
