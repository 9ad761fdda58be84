"""GenEval's rules (arXiv 2310.11513): detections in, a verdict with its reason out; no model and no file is touched.

Asked for is `{"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?: [{"class", "count"}]}`.
All of `include` must be there and none of `exclude`; of a class, the most confident detections are judged. Boxes are
(left, top, right, bottom) in pixels, y pointing down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = "#999999"
"""What the colour classifier sees where the object's mask is not."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Rules:
    """GenEval's numbers. A confidence counts when it lies above its threshold, a component of an offset likewise."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    """Of two boxes of a class that overlap (IoU) by this much or more the less confident goes; 1 keeps both."""
    position_margin: float = 0.1
    position_share: float = 0.5


@dataclass(frozen=True)
class Detection:
    """An object: its class, confidence in [0, 1], box, and the colour that it was classified as (where one was)."""

    name: str
    score: float
    box: Box
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`reason` has a line for each thing that is wrong; "" if `correct`."""

    correct: bool
    reason: str


GENEVAL = Rules()


def judge(found: Sequence[Detection], asked: Mapping[str, Any], rules: Rules = GENEVAL) -> Verdict:
    """The verdict on an image with these detections; they may come in any order.

    ValueError when a colour is asked for and a detection that decides it has none.
    """
    objects = confident(found, asked["tag"], rules)
    wrong: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for wanted in asked.get("include", []):
        group = objects.get(wanted["class"], [])[: wanted["count"]]
        faults = _missing(group, wanted) or _miscolored(group, wanted) or _misplaced(group, wanted, groups, rules)
        wrong += faults
        groups.append(None if faults else group)
    for unwanted in asked.get("exclude", []):
        number = len(objects.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            wrong.append(f"expected {unwanted['class']}<{unwanted['count']}, found {number}")
    return Verdict(not wrong, "\n".join(wrong))


def confident(found: Sequence[Detection], tag: str, rules: Rules = GENEVAL) -> dict[str, list[Detection]]:
    """The detections that count for a prompt of this tag, by class, the most confident first.

    Above the threshold (counting has its own), at most `max_objects` a class, then what overlaps too much removed.
    """
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    kept: dict[str, list[Detection]] = {}
    for item in sorted(found, key=lambda item: -item.score):
        if item.score > threshold and len(kept.get(item.name, [])) < rules.max_objects:
            kept.setdefault(item.name, []).append(item)
    return {name: _apart(items, rules.max_overlap) for name, items in kept.items()}


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in [0, 1]; as in GenEval, a pixel is added to each side."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box, rules: Rules = GENEVAL) -> frozenset[str]:
    """Where `a` lies relative to `b`: up to one of left of/right of and up to one of above/below.

    The offset of the centres is shrunk along each axis by `position_margin` of both boxes' sizes there, and divided by
    the length of the offset before shrinking; a component beyond ±`position_share` gives its name.
    """
    boxes = np.array([a, b], dtype=float).reshape(2, 2, 2)
    center_a, center_b = boxes.mean(axis=1)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    offset = center_a - center_b
    shrunk = np.maximum(np.abs(offset) - rules.position_margin * sizes, 0) * np.sign(offset)
    # Nothing is left of the offset (and it may be zero, by which one cannot divide).
    if np.all(np.abs(shrunk) < 1e-3):
        return frozenset()
    across, down = shrunk / np.linalg.norm(offset)
    share = rules.position_share
    held = zip(RELATIONS, (across < -share, across > share, down < -share, down > share), strict=True)
    return frozenset(name for name, holds in held if holds)


def color_crop(image: Image.Image, box: Box, mask: np.ndarray | None) -> Image.Image:
    """What the colour classifier sees of an object: its box, #999999 outside its mask (bool [H, W] of the image)."""
    seen = image.convert("RGB")
    if mask is not None:
        if mask.shape != (seen.height, seen.width):
            raise ValueError(f"a mask of {mask.shape} on an image of {(seen.height, seen.width)}")
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
        raise ValueError(f"the colour of a {wanted['class']} is asked for, but it was not classified")
    right = seen.count(wanted["color"])
    if right >= wanted["count"]:
        return []
    there = ", ".join(f"{seen.count(color)} {color}" for color in COLORS if color in seen)
    return [
        f"expected {wanted['color']} {wanted['class']}>={wanted['count']}, found {right} {wanted['color']}; and {there}"
    ]


def _misplaced(
    group: Sequence[Detection], wanted: Mapping[str, Any], groups: Sequence[Sequence[Detection] | None], rules: Rules
) -> list[str]:
    """Every object of the group must stand so to every one of the earlier group that `position` names."""
    if "position" not in wanted:
        return []
    relation, index = wanted["position"]
    targets = groups[index]
    if targets is None:
        return [f"no target for {wanted['class']} to be {relation}"]
    for item in group:
        for target in targets:
            held = relations(item.box, target.box, rules)
            if relation not in held:
                there = " and ".join(sorted(held)) or "no clear relation to"
                return [f"expected {wanted['class']} {relation} target, found {there} target"]
    return []
