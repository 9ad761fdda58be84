"""The rows of an evaluation as arrays: what each image is worth by each score.

A row is an image (`correct: true`, or `scores: {name: number}`), or a prompt with several images (`scores: {name: [a
number per image]}`). A suite that is not known here is read by the same rules, so that its images can be paired too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERDICTS = {"strict": "exactly right (strict)", "correct": "right (lenient)"}
"""The shapes judge's verdicts by their key in eval.json, the one that counts first."""
VERDICTS_OF = {
    "geneval": {"correct": "right (by GenEval's rules)"},
    "scenes": {
        **VERDICTS,
        "too_many": "too many objects",
        "too_few": "too few objects",
        "wrong_color": "a wrong colour",
        "wrong_shape": "a wrong shape",
        "wrong_size": "a wrong size",
        "wrong_place": "a wrong place",
        "unclean": "something unclean",
    },
    "editing": {"correct": "edited, the rest kept", "changed": "edited", "kept": "the rest kept"},
}
"""Of suites that have others."""

Values = NDArray[Any]
"""One figure per image: true or false, or a number."""


@dataclass(frozen=True)
class Score:
    """What images are measured by: `share`, whether it says right or wrong; else it is a number in its own unit."""

    label: str
    share: bool


@dataclass(frozen=True)
class Image:
    """An image that was asked for: its prompt, its tag, and which image of its row it is."""

    prompt: str
    tag: str
    row: int
    number: int


@dataclass(frozen=True)
class Judged:
    """One model's images at one guidance: a figure per image by each score, the judge's reasons, mean rewards.

    `rewards` are the means that the file holds without their images' figures. `files` are the images' own, where the
    evaluation names them.
    """

    values: dict[str, Values]
    reasons: tuple[str, ...]
    rewards: dict[str, float]
    files: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = field(default=())
    """Scores that some images do not have, or that are not finite: they are left out."""


def images_of(entry: Mapping[str, Any]) -> list[Image]:
    """The images behind an entry's rows, in order."""
    images = []
    for place, row in enumerate(entry["images"]):
        for number in range(_images_in(row)):
            images.append(Image(str(row["prompt"]), str(row.get("tag", "")), place, number))
    return images


def judged_of(entry: Mapping[str, Any]) -> Judged:
    """An entry's figures per image; TypeError for a verdict that is neither true nor false."""
    rows = entry["images"]
    values: dict[str, Values] = {
        name: np.array([_mark(row[name]) for row in rows])
        for name in _verdicts(entry)
        if any(name in row for row in rows)
    }
    incomplete = []
    for name, key, place in _numbers_in(rows, taken=values):
        column = [figure for row in rows for figure in _figures((row.get(place) or {}).get(name), _images_in(row))]
        numbers = np.array([math.nan if figure is None else figure for figure in column])
        if np.isfinite(numbers).all():
            values[key] = numbers
        else:
            incomplete.append(key)
    reasons = tuple(str(row.get("reason", "")) for row in rows for _ in range(_images_in(row)))
    # A rewards suite has its comparison there, which is made again here.
    told = {str(name): value for name, value in (entry.get("rewards") or {}).items()}
    means = {name: float(value) for name, value in told.items() if not isinstance(value, Mapping)}
    rewards = {name: value for name, value in means.items() if math.isfinite(value)}  # others have no place in a plot
    return Judged(values, reasons, rewards, _files(rows), tuple(incomplete))


def scores_of(entry: Mapping[str, Any]) -> dict[str, Score]:
    """What the entry's images are measured by, the verdict that counts first."""
    verdicts = _verdicts(entry)
    return {
        name: Score(verdicts[name], share=True) if name in verdicts else Score(name, share=False)
        for name in judged_of(entry).values
    }


def _verdicts(entry: Mapping[str, Any]) -> Mapping[str, str]:
    return VERDICTS_OF.get(str(entry.get("suite")), VERDICTS)


def _numbers_in(rows: Sequence[Mapping[str, Any]], taken: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, its key here, the block of the row that it is in) of everything that is measured in numbers."""
    found, keys = [], set(taken)
    for place in ("scores", "rewards"):
        for name in dict.fromkeys(name for row in rows for name in row.get(place) or {}):
            key = f"{place}/{name}" if name in keys else str(name)
            keys.add(key)
            found.append((name, key, place))
    return found


def _images_in(row: Mapping[str, Any]) -> int:
    """How many images a row is about: as many as its longest list of scores has figures; else it is one image."""
    lists = [value for value in (row.get("scores") or {}).values() if isinstance(value, list)]
    return max((len(value) for value in lists), default=1)


def _figures(value: Any, count: int) -> list[float | None]:
    """A row's figures by one score, one per image; None where it has none."""
    figures = value if isinstance(value, list) else [value] * count
    figures = [*figures, *[None] * (count - len(figures))]
    return [None if figure is None else float(figure) for figure in figures]


def _files(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The images' files, if every row names its own."""
    named = [row.get("filenames", [row["filename"]] if "filename" in row else []) for row in rows]
    complete = all(
        isinstance(files, list) and len(files) == _images_in(row) for files, row in zip(named, rows, strict=True)
    )
    return tuple(str(file) for files in named for file in files) if complete else ()


def _mark(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"a verdict is true or false, not {value!r}")
    return value
