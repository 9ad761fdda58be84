"""Edits of the shapes world: a drawn scene, what it shows, what it should show instead, and an exact judge.

An edit changes the colour or the shape of one group of objects: "two red circles" → "two blue circles". What should
change, and what should stay, is known for every object, so that both can be judged apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from agsm_rl.errors import UserError
from agsm_rl.shapes import world
from agsm_rl.shapes.detect import Found, Picture
from agsm_rl.shapes.judge import judge
from agsm_rl.shapes.world import DrawnObject, Requirement, Split

KINDS = ("color", "shape")
TAGS = ("colors", "counting", "color_attr")
"""The requirements that edits lead to: those that name a colour."""


@dataclass(frozen=True)
class ShapeEdit:
    """An edit of a drawing.

    Attributes:
        kind: What changes of the first `changing` objects: `color` or `shape`.
        source: What the drawing shows, in words.
        target: What it should show.
        objects: The drawing's objects; those that change come first.
        changing: How many change.
    """

    kind: str
    source: str
    target: str
    objects: tuple[DrawnObject, ...]
    changing: int

    def to_json(self) -> dict[str, Any]:
        """As plain data, without the target."""
        objects = [asdict(item) for item in self.objects]
        return {"from": self.source, "tag": self.kind, "objects": objects, "changing": self.changing}

    @staticmethod
    def from_json(content: Mapping[str, Any], target: str) -> ShapeEdit:
        """The edit that `to_json` gave; UserError if something is missing."""
        try:
            objects = tuple(DrawnObject(**item) for item in content["objects"])
            edit = ShapeEdit(content["tag"], content["from"], target, objects, int(content["changing"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                "not an edit of the shapes world: `from`, `tag`, `objects` or `changing` is wrong"
            ) from error
        world.parse(target)
        return edit


@dataclass(frozen=True)
class EditVerdict:
    """Whether an edited image shows what it should, and whether all else stayed; `reason` says what is wrong."""

    changed: bool
    kept: bool
    reason: str


def draw_edits(split: Split, num: int, seed: int) -> list[ShapeEdit]:
    """`num` edits, colours and shapes in turn; the i-th is fixed by split, seed and i.

    Their target prompts are of the split; their sources are, where possible, what training images show.
    """
    splits = ("train", "validation", "held_out")
    return [_draw(np.random.default_rng([seed, splits.index(split), 101, i]), split, i) for i in range(num)]


def _draw(rng: np.random.Generator, split: Split, number: int) -> ShapeEdit:
    kind, tag = KINDS[number % 2], TAGS[number // 2 % len(TAGS)]
    target = world.draw_requirement(rng, split, tag)
    source = _before(target, kind, rng)
    scene = world.draw_scene(rng, source, allow_unseen=True)
    wording = int(rng.integers(2**31))  # the same wording of both
    before, after = (world.describe(part, np.random.default_rng(wording)) for part in (source, target))
    return ShapeEdit(kind, before, after, scene.objects, source.groups[0].count)


def _before(target: Requirement, kind: str, rng: np.random.Generator) -> Requirement:
    """The requirement whose first group had another colour or shape."""
    first, *rest = target.groups
    names = list(world.COLORS) if kind == "color" else list(world.SHAPES)
    taken = {getattr(group, kind) for group in target.groups}
    free = [name for name in names if name not in taken]
    others = [replace(first, color=name) if kind == "color" else replace(first, shape=name) for name in free]
    seen = [group for group in others if not world.is_unseen_combination(group.count, str(group.color), group.shape)]
    choices = seen or others
    return replace(target, groups=(choices[int(rng.integers(len(choices)))], *rest))


def judge_edit(image: Picture, edit: ShapeEdit) -> EditVerdict:
    """Judge an edited image.

    changed: by the world's lenient verdict, it shows what the target prompt asks for. kept: every object is where it
    was, within its radius, and is what it was, but for what should change; and nothing else is there. A source that
    is given back unchanged has `kept` alone, and another drawing of the target prompt `changed` alone.
    """
    verdict = judge(image, world.parse(edit.target))
    wrong = [] if verdict.correct else [verdict.reason]
    pairs, extra = _paired(edit.objects, verdict.objects)
    moved = []
    for index, item in enumerate(edit.objects):
        found, name = pairs.get(index), f"the {item.color} {item.shape}"
        free = edit.kind if index < edit.changing else ""
        if found is None:
            moved.append(f"{name} is gone, unclean or elsewhere")
        elif any(getattr(found, part) != getattr(item, part) for part in KINDS if part != free):
            moved.append(f"{name} became a {found.color} {found.shape}")
    moved += [f"an extra {item.color} {item.shape}" for item in extra]
    moved += [f"something unclean at ({blob.x:.0f}, {blob.y:.0f})" for blob in verdict.rejected]
    return EditVerdict(not wrong, not moved, "; ".join(wrong + moved))


def _paired(objects: tuple[DrawnObject, ...], found: tuple[Found, ...]) -> tuple[dict[int, Found], list[Found]]:
    """For each object what is found in its place, the nearest pairs first; and what is found elsewhere."""
    distances = sorted(
        (math.dist((item.x, item.y), (other.x, other.y)), i, j)
        for i, item in enumerate(objects)
        for j, other in enumerate(found)
    )
    pairs: dict[int, int] = {}
    for distance, i, j in distances:
        if i not in pairs and j not in pairs.values() and distance <= objects[i].radius:
            pairs[i] = j
    extra = [other for j, other in enumerate(found) if j not in pairs.values()]
    return {i: found[j] for i, j in pairs.items()}, extra
