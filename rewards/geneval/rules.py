"""GenEval's rules (arXiv 2310.11513): detections in, a verdict with its reason out. Uses no models and no files.

A prompt's metadata is
`{"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?: [{"class", "count"}]}`.
Everything in `include` must be present, and nothing in `exclude`. The most confident detections of each class are
judged. Boxes are (left, top, right, bottom) in pixels, with y pointing down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = "#999999"
"""Fills the area outside the object's mask for the colour classifier."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Rules:
    """GenEval's numbers. Confidences and offsets count only above their thresholds.

    Attributes:
        threshold: Confidence above which a detection counts.
        counting_threshold: The same for prompts tagged `counting`.
        max_objects: Detections per class at most.
        max_overlap: If two boxes of a class overlap (IoU) by at least this much, the less confident is dropped; 1 keeps
            both.
        position_margin: Share of both boxes' sizes by which the offset of their centres is shrunk.
        position_share: Share of the offset that a component must exceed to count as a relation.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1
    position_share: float = 0.5


@dataclass(frozen=True)
class Detection:
    """A detected object: its class, confidence in [0, 1], box and, if it was classified, colour."""

    name: str
    score: float
    box: Box
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`reason` has one line for each fault; it is empty if the image is `correct`."""

    correct: bool
    reason: str


GENEVAL = Rules()


def judge(detections: Sequence[Detection], asked: Mapping[str, Any], rules: Rules = GENEVAL) -> Verdict:
    """The verdict on an image with these detections, in any order.

    ValueError if the prompt asks for a colour and a detection that decides it was not classified.
    """
    objects = confident(detections, asked["tag"], rules)
    faults: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for wanted in asked.get("include", []):
        group = objects.get(wanted["class"], [])[: wanted["count"]]
        wrong = _missing(group, wanted) or _miscolored(group, wanted) or _misplaced(group, wanted, groups, rules)
        faults += wrong
        groups.append(None if wrong else group)
    for unwanted in asked.get("exclude", []):
        number = len(objects.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            faults.append(f"expected {unwanted['class']}<{unwanted['count']}, found {number}")
    return Verdict(not faults, "\n".join(faults))


def confident(detections: Sequence[Detection], tag: str, rules: Rules = GENEVAL) -> dict[str, list[Detection]]:
    """The detections that count for a prompt with this tag, by class, the most confident first.

    They lie above the threshold (counting has its own). At most `max_objects` per class are kept, and none that
    overlaps a more confident one too much.
    """
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    kept: dict[str, list[Detection]] = {}
    for item in sorted(detections, key=lambda item: -item.score):
        if item.score > threshold and len(kept.get(item.name, [])) < rules.max_objects:
            kept.setdefault(item.name, []).append(item)
    return {name: _apart(items, rules.max_overlap) for name, items in kept.items()}


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; as in GenEval, one pixel is added to width and height."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box, rules: Rules = GENEVAL) -> frozenset[str]:
    """Where `a` lies relative to `b`: at most one of left of/right of, and at most one of above/below.

    The offset between the centres is shrunk along each axis by `position_margin` of both boxes' sizes and divided by
    its length before shrinking. Each component beyond ±`position_share` gives a relation.
    """
    boxes = np.array([a, b], dtype=float).reshape(2, 2, 2)
    center_a, center_b = boxes.mean(axis=1)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    offset = center_a - center_b
    shrunk = np.maximum(np.abs(offset) - rules.position_margin * sizes, 0) * np.sign(offset)
    # The offset shrank to nothing; its length may be zero, so do not divide by it.
    if np.all(np.abs(shrunk) < 1e-3):
        return frozenset()
    across, down = shrunk / np.linalg.norm(offset)
    share = rules.position_share
    holds = (across < -share, across > share, down < -share, down > share)
    return frozenset(name for name, is_true in zip(RELATIONS, holds, strict=True) if is_true)


def color_crop(image: Image.Image, box: Box, mask: np.ndarray | None) -> Image.Image:
    """The colour classifier's input: the object's box, grey outside its mask (bool [H, W], as large as the image)."""
    seen = image.convert("RGB")
    if mask is not None:
        if mask.shape != (seen.height, seen.width):
            raise ValueError(f"mask of shape {mask.shape} for an image of shape {(seen.height, seen.width)}")
        seen = Image.composite(seen, Image.new("RGB", seen.size, BACKGROUND), Image.fromarray(mask.astype(bool)))
    left, top, right, bottom = (round(side) for side in box)
    return seen.crop((left, top, right, bottom))


def _apart(items: list[Detection], max_overlap: float) -> list[Detection]:
    if max_overlap >= 1:
        return items
    kept: list[Detection] = []
    for item in items:
        if all(overlap(item.box, other.box) < max_overlap for other in kept):
            kept.append(item)
    return kept


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def _missing(group: Sequence[Detection], wanted: Mapping[str, Any]) -> list[str]:
    if len(group) >= wanted["count"]:
        return []
    return [f"expected {wanted['class']}>={wanted['count']}, found {len(group)}"]


def _miscolored(group: Sequence[Detection], wanted: Mapping[str, Any]) -> list[str]:
    if "color" not in wanted:
        return []
    seen = [item.color for item in group]
    if None in seen:
        raise ValueError(f"the prompt asks for the colour of a {wanted['class']}, but it was not classified")
    number = seen.count(wanted["color"])
    if number >= wanted["count"]:
        return []
    colors = ", ".join(f"{seen.count(color)} {color}" for color in COLORS if color in seen)
    return [
        f"expected {wanted['color']} {wanted['class']}>={wanted['count']}, "
        f"found {number} {wanted['color']}; and {colors}"
    ]


def _misplaced(
    group: Sequence[Detection], wanted: Mapping[str, Any], groups: Sequence[Sequence[Detection] | None], rules: Rules
) -> list[str]:
    """Every object of the group must have the `position` relation to every object of the earlier group it names."""
    if "position" not in wanted:
        return []
    relation, index = wanted["position"]
    targets = groups[index]
    if targets is None:
        return [f"no target for {wanted['class']} to be {relation}"]
    for item in group:
        for target in targets:
            actual = relations(item.box, target.box, rules)
            if relation not in actual:
                described = " and ".join(sorted(actual)) or "no clear relation to"
                return [f"expected {wanted['class']} {relation} target, found {described} target"]
    return []
