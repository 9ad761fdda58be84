"""The scenes of the shapes world: what a prompt can ask for, objects that fulfil it, and their outlines.

Requirements are kept in GenEval's metadata form (arXiv 2310.11513), so that one idea of a checker serves both worlds.
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Any, Literal

import numpy as np

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 180),
}
BACKGROUND = (245, 245, 245)
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# How often each of GenEval's six kinds is drawn for training: the hard kinds more often.
TAG_SHARES = {
    "single_object": 0.10,
    "two_object": 0.13,
    "counting": 0.27,
    "colors": 0.12,
    "position": 0.22,
    "color_attr": 0.16,
}
TAGS = tuple(TAG_SHARES)
Split = Literal["train", "validation", "held_out"]


@dataclass(frozen=True)
class Group:
    """`count` objects of one `shape`; `color` or `size` None means that any will do."""

    count: int
    shape: str
    color: str | None = None
    size: str | None = field(default=None, repr=False)  # not in repr: is_held_out hashes that


@dataclass(frozen=True)
class Requirement:
    """What a prompt asks for: groups of objects, and for `position` where group 0 stands relative to group 1.

    `place` is where in the picture a single object stands; the shapes world has neither places nor sizes.
    """

    tag: str
    groups: tuple[Group, ...]
    relation: str | None = None
    place: str | None = field(default=None, repr=False)  # not in repr: is_held_out hashes that

    def metadata(self, prompt: str) -> dict[str, Any]:
        """GenEval's metadata row for this requirement under the given wording."""
        include: list[dict[str, Any]] = []
        # GenEval lists the anchor of a position first and refers to it by index.
        for group in reversed(self.groups) if self.relation else self.groups:
            entry: dict[str, Any] = {"class": group.shape, "count": group.count}
            if group.color:
                entry["color"] = group.color
            if group.size:
                entry["size"] = group.size
            include.append(entry)
        row: dict[str, Any] = {"tag": self.tag, "include": include, "prompt": prompt}
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        if self.place:
            include[0]["place"] = self.place
        if self.tag == "counting":
            row["exclude"] = [{"class": self.groups[0].shape, "count": self.groups[0].count + 1}]
        return row


@dataclass(frozen=True)
class DrawnObject:
    """One object of a scene; centre and radius of its bounding circle in pixels, colour always definite."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A requirement together with objects that fulfil it exactly."""

    requirement: Requirement
    objects: tuple[DrawnObject, ...]


def _share(text: str) -> float:
    """A number in [0, 1) fixed by the text alone, on every machine and version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


@cache
def is_unseen_combination(count: int, color: str, shape: str) -> bool:
    """True for the colour-shape-count combinations that no training image contains (about one in six)."""
    return _share(f"unseen:{count}:{color}:{shape}") < 1 / 6


def is_held_out(requirement: Requirement) -> bool:
    """True if training never shows this requirement: an unseen combination, or a fifth of the rich tags' prompts.

    `single_object` names a shape alone and has too few prompts to hold any out; there only seeds and noise are new.
    """
    if any(
        group.color and is_unseen_combination(group.count, group.color, group.shape) for group in requirement.groups
    ):
        return True
    if requirement.tag in ("position", "color_attr", "two_object"):
        return _share(repr(requirement)) < 0.2
    return False


def draw_requirement(rng: np.random.Generator, split: Split = "train", tag: str | None = None) -> Requirement:
    """Draw a requirement of the given split (`held_out` ones are never drawn for `train` or `validation`).

    The validation split shares the training requirements and differs by its seeds; choices (guidance, learning rate)
    are made on it, so that the held-out split is looked at once.
    """
    for _ in range(100_000):
        chosen = tag or str(rng.choice(TAGS, p=list(TAG_SHARES.values())))
        requirement = _any_requirement(rng, chosen)
        if chosen == "single_object" or is_held_out(requirement) == (split == "held_out"):
            return requirement
    raise ValueError(f"no {split} requirement of tag {tag!r} exists")


def _any_requirement(rng: np.random.Generator, tag: str) -> Requirement:
    def color() -> str:
        return str(rng.choice(list(COLORS)))

    shape = str(rng.choice(SHAPES))
    if tag == "single_object":
        return Requirement(tag, (Group(1, shape),))
    if tag == "colors":
        return Requirement(tag, (Group(1, shape, color()),))
    if tag == "counting":
        return Requirement(tag, (Group(int(rng.integers(2, 6)), shape, color()),))
    other = str(rng.choice([name for name in SHAPES if name != shape]))
    if tag == "two_object":
        return Requirement(tag, (Group(1, shape), Group(1, other)))
    if tag == "position":
        colors = (color(), color()) if rng.random() < 0.5 else (None, None)
        groups = (Group(1, shape, colors[0]), Group(1, other, colors[1]))
        return Requirement(tag, groups, str(rng.choice(list(RELATIONS))))
    if tag == "color_attr":
        first, second = rng.choice(list(COLORS), size=2, replace=False)
        return Requirement(tag, (Group(1, shape, str(first)), Group(1, other, str(second))))
    raise ValueError(f"{tag!r} is not a tag of the shapes world; it has {', '.join(TAGS)}")


def draw_scene(
    rng: np.random.Generator, requirement: Requirement, *, allow_unseen: bool = False, overlap: bool = False
) -> Scene:
    """Place objects that fulfil the requirement exactly: nothing extra, nothing outside, no overlap unless asked.

    `allow_unseen` also permits the colour-shape-count combinations that training images never contain.
    """
    total = sum(group.count for group in requirement.groups)
    low, high = (4.5, 6.5) if total <= 2 else (4.2, 5.4) if total == 3 else (3.9, 4.7)
    for _ in range(100_000):
        kinds = []
        for group in requirement.groups:
            color = group.color or str(rng.choice(list(COLORS)))
            if not allow_unseen and is_unseen_combination(group.count, color, group.shape):
                break
            kinds += [(group.shape, color)] * group.count
        if len(kinds) != total:
            continue
        # Plain numbers: of some hundred tries most are given up at the first two objects.
        radii = rng.uniform(low, high, size=total).tolist()
        places = [(r + 0.5, IMAGE_SIZE - r - 0.5) for r in radii]
        drawn = rng.random((total, 2)).tolist()
        centers = [(a + (b - a) * x, a + (b - a) * y) for (a, b), (x, y) in zip(places, drawn, strict=True)]
        if not overlap and not stands_apart(centers, radii):
            continue
        if requirement.relation and not stands_clearly(requirement.relation, *centers):
            continue
        objects = (
            DrawnObject(shape, color, x, y, r) for (shape, color), (x, y), r in zip(kinds, centers, radii, strict=True)
        )
        return Scene(requirement, tuple(objects))
    raise ValueError(f"no place found for {requirement}")


def stands_apart(centers: list[tuple[float, float]], radii: list[float], gap: float = 1.6) -> bool:
    """Whether circles of these centres and radii keep `gap` pixels between them."""
    pairs = combinations(zip(centers, radii, strict=True), 2)
    return all(math.dist(first, second) >= r + s + gap for (first, r), (second, s) in pairs)


def stands_clearly(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether `first` is in that direction from `second`: along its axis, and by half more than across it."""
    right, down = RELATIONS[relation]
    x, y = first[0] - second[0], first[1] - second[1]
    along, across = (right * x, abs(y)) if right else (down * y, abs(x))
    return along > 1.5 * across


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The polygon of a shape inside the bounding circle (a circle itself is a fine polygon)."""
    if shape == "square":
        angles, radii = np.deg2rad([45, 135, 225, 315]), np.full(4, radius * 1.1)
    elif shape == "triangle":
        angles, radii = np.deg2rad([-90, 30, 150]), np.full(3, radius * 1.12)
    elif shape == "star":
        angles = np.deg2rad(-90 + 36 * np.arange(10))
        radii = radius * 1.12 * np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    elif shape == "circle":
        angles, radii = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.full(48, radius * 0.95)
    else:
        raise ValueError(f"{shape!r} is not a shape; there are {', '.join(SHAPES)}")
    return [(float(x + r * np.cos(a)), float(y + r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]
