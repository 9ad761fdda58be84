"""Measurements in files: what a suite, and rewards beside it, say of each image at one guidance; the first pictures.

The cells of a sweep keep theirs so, and so does the base that runs and sweeps share (kept_base.py). Rows and pictures
have a checksum: a damaged measurement counts as missing, and is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import write_picture
from agsm_rl.evaluate.image_folder import open_picture, sha256
from agsm_rl.evaluate.kept_files import KeptFile, read_kept, warn_damaged
from agsm_rl.evaluate.measured import Entry, Measured, from_rows
from agsm_rl.evaluate.suite import Judged
from agsm_rl.evaluate.suites.shapes import ImageVerdict, ShapesResult
from agsm_rl.files import write_text


class Rows(KeptFile):
    """A row of each image, by one of the suites that judged it."""

    prompt_index: int
    number: int
    metadata: dict[str, Any]
    row: Any


class JudgedMeasurement(KeptFile):
    """What a suite, and rewards beside it, say of each image at one guidance.

    `checksum` is of the rows and of the pictures' files; those of earlier versions have none.
    """

    settings: dict[str, Any] | None = None
    judged: list[list[Rows]] = Field(min_length=1)
    checksum: str | None = None


class Measurement(KeptFile):
    """The same of an earlier version: the shapes suite's verdicts and mean rewards."""

    settings: dict[str, Any] | None = None
    suite: str
    images: list[ImageVerdict] = Field(min_length=1)
    rewards: dict[str, float]


def measurement_file(folder: Path, label: str, guidance: float, *depends_on: Any) -> Path:
    """The file of a measurement that is `depends_on` what determines it; plain JSON."""
    key = hashlib.sha256(json.dumps(list(depends_on), sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{label}-guidance{guidance:g}-{key}.json"


def same_label(file: Path) -> list[Path]:
    """The other measurements of the same label and guidance."""
    files = sorted(file.parent.glob(f"{file.name.rpartition('-')[0]}-*.json"))
    return [other for other in files if other != file]


def settings_in(file: Path) -> dict[str, Any] | None:
    """The settings of a measurement in a file."""
    content = read_kept(file, JudgedMeasurement, warn=False) or read_kept(file, Measurement)
    settings: dict[str, Any] | None = content.get("settings")
    return settings


def write_measurement(file: Path, settings: Mapping[str, Any], measured: Measured) -> None:
    """Write a measurement and its pictures; after a kill, the file is there with all its pictures or not at all."""
    for row, image in measured.pictures.items():
        write_picture(image, pictures_of(file) / f"{row:04d}.png")
    judged = [[_row(item) for item in rows] for rows in measured.judged]
    content = {"settings": dict(settings), "judged": judged, "checksum": _checksum(judged, file)}
    write_text(file, json.dumps(content | measured.to_json()) + "\n")


def read_measurement(file: Path, entry: Entry, guidance: float) -> Measured | None:
    """The measurement in a file; None if there is no file, or if it or one of its pictures is damaged."""
    content = read_kept(file, JudgedMeasurement, warn=False) or read_kept(file, Measurement)
    if not content:
        return None
    try:
        pictures = {int(path.stem): open_picture(path) for path in sorted(pictures_of(file).glob("*.png"))}
        if not pictures:
            raise ValueError("its images are missing")
        if "judged" not in content:
            result = ShapesResult.from_json(content)
            return Measured(entry, guidance, result, content["rewards"], pictures)
        if content.get("checksum") not in (None, _checksum(content["judged"], file)):
            raise ValueError("it or one of its images is not what was written")
        judged = [[Judged(**row) for row in rows] for rows in content["judged"]]
        measured = from_rows(entry, guidance, judged, {})
        measured.pictures = pictures
        return measured
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        warn_damaged(file, f"{type(error).__name__}: {error}")
        return None


def pictures_of(file: Path) -> Path:
    """The folder of a measurement's pictures."""
    return file.with_suffix("")


def _row(item: Judged) -> dict[str, Any]:
    return {
        "prompt_index": item.prompt_index,
        "number": item.number,
        "metadata": dict(item.metadata),
        "row": item.row,
    }


def _checksum(judged: Any, file: Path) -> str:
    """Of the rows, and of the pictures as they are on the disk."""
    pictures = {path.name: sha256(path) for path in sorted(pictures_of(file).glob("*.png"))}
    return hashlib.sha256(json.dumps([judged, pictures], sort_keys=True).encode()).hexdigest()
