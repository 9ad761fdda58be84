"""What a prompt of the scenes world can ask for, and objects that fulfil it."""

from functools import cache, lru_cache
from itertools import product
from typing import Any

import numpy as np

from agsm_rl.shapes.look import Look
from agsm_rl.shapes.scenes import RELATIONS, DrawnObject, Group, Requirement, Scene, Split, stands_apart, stands_clearly
from agsm_rl.shapes.scenes_world import splits

SHAPES = splits.SHAPES
COLORS = {
    "red": (205, 30, 50),
    "orange": (240, 130, 20),
    "yellow": (245, 220, 50),
    "green": (40, 160, 60),
    "cyan": (40, 190, 210),
    "blue": (45, 80, 215),
    "purple": (150, 60, 180),
    "black": (40, 40, 45),
}
LOOK = Look(
    shapes=SHAPES,
    colors=COLORS,
    # The four shapes of the shapes world much as there; no other shape comes near the new ones (0.76 at most, 0.72 a
    # ring), and a ring's hole and a moon's tips are what an autoencoder loses first.
    min_fit={
        "circle": 0.87,
        "square": 0.86,
        "triangle": 0.83,
        "star": 0.79,
        "cross": 0.80,
        "ring": 0.75,
        "heart": 0.80,
        "moon": 0.76,
    },
    max_color_error=46.0,
)
RADII = {"small": (3.6, 4.4), "large": (5.8, 6.8)}
MARGIN = 2.0
"""Pixels between an object's centre and the edge of the place that a prompt names."""
TAG_SHARES = {
    "single_object": 0.15,
    "two_object": 0.15,
    "counting": 0.22,
    "colors": 0.13,
    "position": 0.19,
    "color_attr": 0.16,
}
"""How often each of GenEval's six kinds is drawn for training."""
TAGS = tuple(TAG_SHARES)
OPEN_COLOR = 0.3
"""How often two_object and position leave the colour open, in training."""


def draw_requirement(rng: np.random.Generator, split: Split = "train", tag: str | None = None) -> Requirement:
    """Draw a requirement of the given split; no requirement belongs to two."""
    tag = tag or str(rng.choice(TAGS, p=list(TAG_SHARES.values())))
    if split != "train":
        listed = requirements_of(split, tag)
        return listed[int(rng.integers(len(listed)))]
    open_color = bool(rng.random() < OPEN_COLOR)
    while not can_be_seen(requirement := _any_requirement(rng, tag, open_color)):
        pass
    return requirement


@cache
def requirements_of(split: Split, tag: str) -> tuple[Requirement, ...]:
    """Every requirement of a split that training never shows, in a fixed order; of the training split, none.

    Raises ValueError for a tag that is not one of `TAGS`.
    """
    if tag not in TAGS:
        raise _not_a_tag(tag)
    return tuple(_asks_for(*key) for key, of in splits.held_out().items() if of == split and key[0] == tag)


def _asks_for(tag: Any, *rest: Any) -> Requirement:
    """The requirement of a combination; of two coloured shapes, either may be named first."""
    if tag == "single_object":
        size, shape, place = rest
        return Requirement(tag, (Group(1, shape, size=size),), place=place)
    if tag == "colors":
        size, color, shape = rest
        return Requirement(tag, (Group(1, shape, color, size),))
    if tag == "counting":
        count, color, shape = rest
        return Requirement(tag, (Group(count, shape, color),))
    if tag == "two_object":
        size, color, shape, other = rest
        return Requirement(tag, (Group(1, shape, color, size), Group(1, other)))
    if tag == "position":
        color, shape, relation, other = rest
        return Requirement(tag, (Group(1, shape, color), Group(1, other)), relation)
    return Requirement(tag, tuple(Group(1, str(shape), str(color)) for color, shape in splits.shuffled(rest)))


def _any_requirement(rng: np.random.Generator, tag: str, open_color: bool) -> Requirement:
    def pick(names: tuple[str, ...]) -> str:
        return names[int(rng.integers(len(names)))]

    shape = pick(SHAPES)
    if tag == "single_object":
        return Requirement(tag, (Group(1, shape, size=pick(splits.SIZES)),), place=pick(splits.PLACES))
    if tag == "colors":
        return Requirement(tag, (Group(1, shape, pick(splits.COLORS), pick(splits.SIZES)),))
    if tag == "counting":
        return Requirement(tag, (Group(int(rng.integers(2, 5)), shape, pick(splits.COLORS)),))
    other = pick(tuple(name for name in SHAPES if name != shape))
    color = None if open_color else pick(splits.COLORS)
    if tag == "two_object":
        return Requirement(tag, (Group(1, shape, color, pick(splits.SIZES)), Group(1, other)))
    if tag == "position":
        return Requirement(tag, (Group(1, shape, color), Group(1, other)), pick(tuple(RELATIONS)))
    if tag == "color_attr":
        first = pick(splits.COLORS)
        second = pick(tuple(name for name in splits.COLORS if name != first))
        return Requirement(tag, (Group(1, shape, first), Group(1, other, second)))
    raise _not_a_tag(tag)


def _not_a_tag(tag: str) -> ValueError:
    return ValueError(f"{tag!r} is not a tag of the scenes world; it has {', '.join(TAGS)}")


def draw_scene(rng: np.random.Generator, requirement: Requirement, *, allow_unseen: bool = False) -> Scene:
    """Place objects that fulfil the requirement exactly: nothing extra, nothing outside, no overlap.

    Unless `allow_unseen`, the drawing shows nothing that is held out. ValueError if there is no such drawing.
    """
    kinds = [kind for kind in _kinds(requirement) if allow_unseen or not splits.shows_unseen_kinds(kind)]
    if not kinds:
        raise ValueError(f"a drawing of {requirement} without anything held out does not exist")
    for _ in range(100_000):
        kind = kinds[int(rng.integers(len(kinds)))]
        radii = [float(rng.uniform(*RADII[size])) for size, _, _ in kind]
        drawn = rng.random((len(kind), 2)).tolist()
        centers = [
            (_between(r, x), _between(r, y)) if not requirement.place else _inside(requirement.place, r, x, y)
            for r, (x, y) in zip(radii, drawn, strict=True)
        ]
        if not stands_apart(centers, radii):
            continue
        if requirement.relation and not stands_clearly(requirement.relation, *centers):
            continue
        objects = tuple(
            DrawnObject(shape, color, x, y, r)
            for (_, color, shape), (x, y), r in zip(kind, centers, radii, strict=True)
        )
        if allow_unseen or not splits.shows_unseen_places(objects):
            return Scene(requirement, objects)
    raise ValueError(f"no place found for {requirement}")


Kind = tuple[tuple[str, str, str], ...]
"""Size, colour and shape of each object."""


@lru_cache(maxsize=20_000)
def _kinds(requirement: Requirement) -> tuple[Kind, ...]:
    """All sizes and colours that the requirement leaves open. Objects of one group are alike in colour."""
    total = sum(group.count for group in requirement.groups)
    free = splits.SIZES if total <= 2 else ("small",)
    choices = []
    for group in requirement.groups:
        colors = (group.color,) if group.color else splits.COLORS
        sizes = product(*[(group.size,) if group.size else free] * group.count)
        choices.append([tuple((s, c, group.shape) for s in of) for of, c in product(list(sizes), colors)])
    return tuple(tuple(item for part in parts for item in part) for parts in product(*choices))


@lru_cache(maxsize=20_000)
def can_be_seen(requirement: Requirement) -> bool:
    """Whether training may show it: it is in that split, and a drawing of it without anything held out exists."""
    return splits.split_of(requirement) == "train" and any(
        not splits.shows_unseen_kinds(kind) for kind in _kinds(requirement)
    )


def _between(radius: float, share: float) -> float:
    """A coordinate between the borders."""
    low, high = radius + 0.5, LOOK.image_size - radius - 0.5
    return low + (high - low) * share


def _inside(place: str, radius: float, x: float, y: float) -> tuple[float, float]:
    """A point well inside a place of the picture."""
    column, row = splits.column_and_row(place)

    def along(third: int, share: float) -> float:
        low, high = [
            (radius + 0.5, max(splits.EDGES[0] - MARGIN, radius + 1.0)),
            (splits.EDGES[0] + MARGIN, splits.EDGES[1] - MARGIN),
            (min(splits.EDGES[1] + MARGIN, LOOK.image_size - radius - 1.0), LOOK.image_size - radius - 0.5),
        ][third]
        return low + (high - low) * share

    return along(column, x), along(row, y)
