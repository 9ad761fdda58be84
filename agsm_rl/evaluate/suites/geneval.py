"""GenEval's suite (arXiv 2310.11513): 553 prompts, 4 images each; the score is the mean over six tags.

"GenEval-compatible": the prompts, layouts and rules are GenEval's, and the detector is the same network with weights
from transformers. How closely its verdicts agree with the reference detector's has not been measured; to measure it,
compare `--against` a reference results.jsonl of the same images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from agsm_rl_rewards.geneval.detector import (
    CLASSIFIER,
    DETECTOR,
    STORED_ABOVE,
    Detector,
    detections,
)
from agsm_rl_rewards.geneval.requirements import classes_by_colour, fault, object_names, requirements
from agsm_rl_rewards.geneval.rules import GENEVAL, Rules, confident, judge
from PIL.Image import Image
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.figures import Scores, interval_json, share_table
from agsm_rl.evaluate.image_folder import file_name
from agsm_rl.evaluate.intervals import Interval, mean_of, mean_of_groups, paired_difference, wilson
from agsm_rl.evaluate.suite import Judged, Metadata, Row, Suite
from agsm_rl.files import parse_json, read_text, write_text
from agsm_rl.recipe.options import NumImages

LABEL = "GenEval-compatible (agreement with the reference detector not measured)"
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
IMAGES_PER_PROMPT = 4
RESULTS = "results.jsonl"
IMAGE_KEYS = ("filename", "prompt", "tag", "correct", "reason")
"""Fields of a verdict that eval.json also holds, so that a report can pair it with another model's."""


@dataclass(frozen=True)
class ImageResult:
    """A line of results.jsonl: the verdict on one image, and the detections that counted by class.

    details: {class: [[left, top, right, bottom, confidence], …]}.
    """

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: Mapping[str, Any]
    details: Mapping[str, Any]

    @property
    def key(self) -> tuple[int, int]:
        """The numbers of the prompt and the image, from `…/00000/samples/0000.png`."""
        path = Path(self.filename)
        try:
            return int(path.parents[1].name), int(path.stem)
        except (ValueError, IndexError) as error:
            raise UserError(
                f"results: '{self.filename}' is not in GenEval's layout (…/00000/samples/0000.png), so it cannot be "
                "paired with another target's image."
            ) from error


@dataclass(frozen=True)
class GenEvalResult:
    """The verdicts on one target's images."""

    rows: tuple[ImageResult, ...]

    @property
    def by_tag(self) -> dict[str, list[ImageResult]]:
        """The verdicts of each tag that occurs, tags in GenEval's order."""
        order = [*TAGS, *dict.fromkeys(row.tag for row in self.rows if row.tag not in TAGS)]
        by_tag = {tag: [row for row in self.rows if row.tag == tag] for tag in order}
        return {tag: rows for tag, rows in by_tag.items() if rows}

    def scores(self) -> dict[str, Interval]:
        """`overall`, the mean over tags."""
        return {"overall": self.shares.overall}

    def per_image(self) -> dict[str, list[float]]:
        """None: the score is a mean over tags."""
        return {}

    @property
    def shares(self) -> Scores:
        """Shares of correct images by tag, and their mean."""
        counts = {tag: (sum(row.correct for row in rows), len(rows)) for tag, rows in self.by_tag.items()}
        tags = {tag: wilson(*count) for tag, count in counts.items()}
        return Scores(mean_of(list(tags.values())), tags, counts)

    def over_prompts(self) -> Interval:
        """The overall score with its interval over prompts: how it would vary with other prompts of the same kinds."""
        return mean_of_groups([[_share(rows) for rows in _by_prompt(part)] for part in self.by_tag.values()])

    def to_json(self) -> dict[str, Any]:
        """eval.json's content."""
        prompts = _by_prompt(self.rows)
        return {
            "suite": "geneval",
            "label": LABEL,
            "num_images": len(self.rows),
            **self.shares.to_json(),
            "over_prompts": interval_json(self.over_prompts()),
            "correct_images": interval_json(wilson(sum(row.correct for row in self.rows), len(self.rows))),
            "num_prompts": len(prompts),
            "prompts_with_a_correct_image": sum(any(row.correct for row in rows) for rows in prompts),
            "images": [{key: getattr(row, key) for key in IMAGE_KEYS} for row in sorted(self.rows, key=_place)],
        }

    def show(
        self, console: Console, other: GenEvalResult | None = None, *, labels: tuple[str, str] = ("other", "this")
    ) -> None:
        """Print shares by tag; with `other`, both targets and the paired difference."""
        changes = self._differences(other) if other else None
        scores = [other.shares, self.shares] if other else [self.shares]
        console.print(share_table("GenEval-compatible, %, 95 % intervals", scores, changes, labels))

    def against(self, other: GenEvalResult) -> dict[str, Any]:
        """This target minus the other, by tag and overall, and the share of images on which the verdicts agree."""
        overall, tags = self._differences(other)
        pairs = self._pairs(other)
        same = sum(theirs.correct == ours.correct for theirs, ours in pairs)
        return {
            "difference": {"overall": asdict(overall), "tags": {tag: asdict(part) for tag, part in tags.items()}},
            "same_verdict": interval_json(wilson(same, len(pairs))),
        }

    def _pairs(self, other: GenEvalResult) -> list[tuple[ImageResult, ImageResult]]:
        theirs = {row.key: row for row in other.rows}
        ours = {row.key: row for row in self.rows}
        if {key: row.prompt for key, row in theirs.items()} != {key: row.prompt for key, row in ours.items()}:
            raise UserError(
                f"the two results are on different prompts or images ({len(theirs)} and {len(ours)} of them); "
                "draw both with the same --num-images."
            )
        return [(theirs[key], row) for key, row in ours.items()]

    def _differences(self, other: GenEvalResult) -> tuple[Interval, dict[str, Interval]]:
        pairs = self._pairs(other)
        tags = {}
        for tag in self.by_tag:
            part = [(theirs.correct, ours.correct) for theirs, ours in pairs if ours.tag == tag]
            tags[tag] = paired_difference([before for before, _ in part], [after for _, after in part])
        return mean_of(list(tags.values())), tags


class GenEval(Suite):
    """Objects, counts, colours and positions, by GenEval's rules on a detector's finds.

    Rows are detections, so that judging by other rules needs no detector.

    Args:
        num_images: How many images to draw, the first of each prompt before any second one. Null: 2212, four of each.
        detector: Folder or hub id of a Mask2Former trained on COCO instances.
        classifier: Folder or hub id of a CLIP, for colours.
    """

    name = "geneval"
    folder = "detections"
    rules: Rules = GENEVAL

    def __init__(
        self, *, num_images: NumImages | None = None, detector: str = DETECTOR, classifier: str = CLASSIFIER
    ) -> None:
        self.detector, self.classifier = detector, classifier
        self.num_images = num_images or IMAGES_PER_PROMPT * len(self.prompts())

    @cached_property
    def _models(self) -> Detector:
        return Detector(self.detector, self.classifier)

    def how(self) -> Mapping[str, Any]:
        """The two networks, and which detections are kept."""
        return {"detector": self.detector, "classifier": self.classifier, "above": STORED_ABOVE}

    def prompts(self) -> dict[int, dict[str, Any]]:
        """GenEval's prompts by line number, with tags interleaved: the first n are as balanced as the full set."""
        data = files("agsm_rl_rewards.geneval") / "data" / "evaluation_metadata.jsonl"
        rows = {index: json.loads(line) for index, line in enumerate(data.read_text(encoding="utf-8").splitlines())}
        of_tag = {tag: [index for index, row in rows.items() if row["tag"] == tag] for tag in TAGS}
        places = {index: (k + 0.5) / len(part) for part in of_tag.values() for k, index in enumerate(part)}
        return {index: rows[index] for index in sorted(rows, key=lambda index: (places[index], index))}

    def prepare(self) -> None:
        """Load the detector and the colour classifier."""
        assert self._models

    def check(self, metadata: Metadata) -> None:
        """UserError unless a prompt's metadata says, in GenEval's form, what the image should show."""
        reason = fault(requirements(metadata), set(object_names()))
        if reason:
            raise UserError(f"{reason}; take it from GenEval's evaluation_metadata.jsonl.")

    def judge(self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Row]:
        """The objects in each picture, with the colours of those whose colour the prompt asks for."""
        rows = []
        for picture, asked in zip(images, metadata, strict=True):
            colored = classes_by_colour(requirements(asked))
            rows.append({"size": list(picture.size), "seen": self._models(picture, colored)})
        return rows

    def result(self, judged: Sequence[Judged]) -> GenEvalResult:
        """The verdicts, from the detections."""
        return GenEvalResult(tuple(self._verdict(item) for item in judged))

    def read_results(self, file: Path) -> GenEvalResult:
        """The verdicts in a results.jsonl, ours or the reference's."""
        return read_results(file)

    def write_results(self, result: GenEvalResult, folder: Path) -> None:
        """Write results.jsonl in the published layout."""
        write_results(result, folder / RESULTS)

    def _verdict(self, item: Judged) -> ImageResult:
        stored = detections(item.row["seen"])
        verdict = judge(stored, requirements(item.metadata), self.rules)
        details = {
            name: [[*detection.box, detection.score] for detection in group]
            for name, group in confident(stored, item.metadata["tag"], self.rules).items()
        }
        return ImageResult(
            item.filename or file_name(item.prompt_index, item.number),
            item.metadata["tag"],
            item.prompt,
            verdict.correct,
            verdict.reason,
            metadata=item.metadata,
            details=details,
        )


def write_results(result: GenEvalResult, file: Path) -> None:
    """Write results.jsonl in the published layout: one line per image, `metadata` and `details` as JSON strings."""
    lines = []
    for row in result.rows:
        inner = {"metadata": json.dumps(row.metadata), "details": json.dumps(row.details)}
        lines.append(json.dumps(asdict(row) | inner, ensure_ascii=False))
    write_text(file, "\n".join(lines) + "\n")


def read_results(file: Path) -> GenEvalResult:
    """Read a results.jsonl, ours or the reference's; UserError with the number of a line that is not a result."""
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(parse_json(line, where="JSON")))
        except (UserError, ValueError, LookupError, TypeError) as error:
            keys = ", ".join(ImageResult.__dataclass_fields__)
            raise UserError(
                f"{file}: line {number} is not a line of GenEval's results.jsonl ({type(error).__name__}: {error}); it "
                f"should be a JSON object of {keys}."
            ) from error
    if not rows:
        raise UserError(f"{file}: has no results.")
    return GenEvalResult(tuple(rows))


def _row(content: dict[str, Any]) -> ImageResult:
    """The result on a line, whose `metadata` and `details` are JSON strings."""
    inner = {key: parse_json(content[key], where=key) for key in ("metadata", "details")}
    row = ImageResult(**{key: (content | inner)[key] for key in ImageResult.__dataclass_fields__})
    if not isinstance(row.correct, bool) or not all(isinstance(text, str) for text in (row.filename, row.tag)):
        raise TypeError("filename and tag must be strings, and correct must be true or false")
    return row


def _by_prompt(rows: Sequence[ImageResult]) -> list[list[ImageResult]]:
    groups: dict[str, list[ImageResult]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.metadata, sort_keys=True), []).append(row)
    return list(groups.values())


def _place(row: ImageResult) -> tuple[str, ...]:
    """Where an image lies in its folder, which sorts the images of any tool in the same order."""
    return Path(row.filename).parts[-3:]


def _share(rows: Sequence[ImageResult]) -> float:
    return sum(row.correct for row in rows) / len(rows)
