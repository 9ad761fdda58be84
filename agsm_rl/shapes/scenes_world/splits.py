"""Which requirements of the scenes world training never shows: 20 or more of each tag to validate on, as many to test.

A requirement's *combination* is what is new about it: size, shape and place of a single object; size, colour and shape;
number, colour and shape; two shapes of which one has a size and a colour; two shapes of which one has a colour, and
where they stand; two coloured shapes. Combinations are held out, not wordings: no training caption asks for one, and no
training drawing shows one, whatever its caption. Every shape, colour, size, number, place and relation occurs in
training, and so does every arrangement of two shapes, in several colours: what a model never sees it learns to be
impossible, whatever the words say.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from functools import cache
from itertools import permutations, product
from typing import Any

from agsm_rl.shapes.look import box_offset
from agsm_rl.shapes.scenes import DrawnObject, Requirement, Split

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black")
SIZES = ("small", "large")
LARGE_FROM = 5.1
"""Radius in pixels from which an object is large."""
COUNTS = (2, 3, 4)
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
EDGES = (12.0, 20.0)
"""The picture's thirds, across and down, for the centre of an object."""
HELD_OUT = {"single_object": 20, "two_object": 20, "counting": 22, "colors": 20, "position": 20, "color_attr": 60}
"""How many combinations of each tag are validated on, and how many more are for the test."""
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Key = tuple[Hashable, ...]


def split_of(requirement: Requirement) -> Split:
    """The split of a requirement; one that leaves size, colour or place open is in training."""
    return held_out().get(key_of(requirement), "train")


def key_of(requirement: Requirement) -> Key:
    """The requirement's combination; wordings that mean the same have the same."""
    first, *rest = requirement.groups
    if requirement.tag == "single_object":
        return ("single_object", first.size, first.shape, requirement.place)
    if requirement.tag == "colors":
        return ("colors", first.size, first.color, first.shape)
    if requirement.tag == "counting":
        return ("counting", first.count, first.color, first.shape)
    second = rest[0]
    if requirement.tag == "two_object":
        bare = first.size is None and first.color is None
        shapes = sorted((first.shape, second.shape)) if bare else (first.shape, second.shape)
        return ("two_object", first.size, first.color, *shapes)
    if requirement.tag == "position":
        return _arrangement(first.color, first.shape, str(requirement.relation), second.shape)
    return _two_colored((str(first.color), first.shape), (str(second.color), second.shape))


def column_and_row(place: str) -> tuple[int, int]:
    """The thirds of a place, from the left and from the top."""
    index = PLACES.index(place)
    return index % 3, index // 3


def place_of(x: float, y: float) -> str:
    """The place of a point."""
    column, row = (sum(value > edge for edge in EDGES) for value in (x, y))
    return PLACES[3 * row + column]


def size_of(radius: float) -> str:
    """The size of an object."""
    return "large" if radius >= LARGE_FROM else "small"


def shows_unseen_kinds(kinds: Sequence[tuple[str, str, str]]) -> bool:
    """Whether objects of these sizes, colours and shapes, wherever they stand, show a held-out combination."""
    unseen = held_out()
    keys: list[Key] = [("colors", *kind) for kind in kinds]
    counts = Counter((color, shape) for _, color, shape in kinds)
    keys += [("counting", count, *of) for of, count in counts.items()]
    for kind, other in permutations(kinds, 2):
        if kind[-1] != other[-1]:
            keys += [("two_object", *kind, other[-1]), _two_colored(kind[1:], other[1:])]
    return any(key in unseen for key in keys)


def shows_unseen_places(objects: Sequence[DrawnObject]) -> bool:
    """Whether objects, by where they stand, show a held-out combination."""
    unseen = held_out()
    keys: list[Key] = []
    for item in objects:
        x, y = box_offset(item.shape)  # a judge reads the place off the bounding box
        places = {place_of(item.x, item.y), place_of(item.x + x * item.radius, item.y + y * item.radius)}
        keys += [("single_object", size_of(item.radius), item.shape, place) for place in places]
    for first, second in permutations(objects, 2):
        if first.shape != second.shape:
            told = _relations(first, second)
            keys += [_arrangement(first.color, first.shape, relation, second.shape) for relation in told]
    return any(key in unseen for key in keys)


def _relations(first: DrawnObject, second: DrawnObject) -> list[str]:
    """Every relation in which a judge might see them: more than 25 degrees off the other axis."""
    x, y = first.x - second.x, first.y - second.y
    found = [("right of" if x > 0 else "left of", abs(x), abs(y)), ("below" if y > 0 else "above", abs(y), abs(x))]
    return [name for name, along, across in found if along > 0.46 * across]


def _arrangement(color: str | None, shape: str, relation: str, other: str) -> Key:
    """Two shapes, the first of this colour, and where they stand; without a colour, either may be named first."""
    if color is None and relation in ("right of", "below"):
        shape, relation, other = other, MIRRORED[relation], shape
    return ("position", color, shape, relation, other)


def _two_colored(first: tuple[str, str], second: tuple[str, str]) -> Key:
    return ("color_attr", *sorted((first, second)))


@cache
def held_out() -> dict[Key, Split]:
    """The split of each held-out combination."""
    colors = _choose(product(["colors"], SIZES, COLORS, SHAPES), lambda key: [(key[2:], 1)])
    small = {key[2:] for key in colors if key[1] == "small"}
    # Three and four objects are small: what is never shown small cannot be counted.
    counted = (key for key in product(["counting"], COUNTS, COLORS, SHAPES) if key[2:] not in small)
    shapes = list(permutations(SHAPES, 2))
    # One colour of each is held out: what no drawing shows, in any colour, a base learns to be impossible.
    pairs = _choose((("two_object", size, *pair) for size, pair in product(SIZES, shapes)), lambda key: [(key[2:], 1)])
    arrangements = _choose(
        (("position", a, relation, b) for (a, b), relation in product(shapes, ("left of", "above"))),
        lambda key: [((frozenset((key[1], key[3])), key[2]), 1)],
    )
    two_colored = {_two_colored(a, b) for a, b in product(product(COLORS, SHAPES), repeat=2) if _differ(a, b)}
    return (
        colors
        | _choose(counted, lambda key: [(key[2:], 1)])
        | _choose(
            product(["single_object"], SIZES, SHAPES, PLACES),
            lambda key: [(("kind", *key[1:3]), 3), (("place", key[3]), 5)],
        )
        | {_in_a_color(key, colors): split for key, split in pairs.items()}
        | {shuffled(_colored_arrangements(*key))[0]: split for key, split in arrangements.items()}
        | _choose(two_colored, lambda key: [])
    )


def _differ(first: tuple[str, str], second: tuple[str, str]) -> bool:
    return first[0] != second[0] and first[1] != second[1]


def _choose(keys: Iterable[Key], limits: Callable[[Key], list[tuple[Hashable, int]]]) -> dict[Key, Split]:
    """The held-out ones of a tag's combinations.

    `limits` names the groups that a combination belongs to, and how many of each group may be held out.
    """
    ordered = shuffled(keys)
    wanted = 2 * HELD_OUT[str(ordered[0][0])]
    taken: Counter[Hashable] = Counter()
    chosen: dict[Key, Split] = {}
    for key in ordered:
        groups = limits(key)
        if len(chosen) < wanted and all(taken[group] < most for group, most in groups):
            taken.update(group for group, _ in groups)
            chosen[key] = "held_out" if len(chosen) % 2 else "validation"
    return chosen


def _in_a_color(pair: Key, unseen: Container[Key]) -> Key:
    """A pair of shapes, the first in one of the colours that are not held out for it anyway."""
    tag, size, first, second = pair
    known = [color for color in COLORS if ("colors", size, color, first) not in unseen]
    return shuffled((tag, size, color, first, second) for color in known)[0]


def _colored_arrangements(_: Any, first: Any, relation: Any, second: Any) -> list[Key]:
    """Both ways of saying where they stand, each with a colour of the shape that is named first."""
    ways = ((first, relation, second), (second, MIRRORED[relation], first))
    return [_arrangement(color, *way) for color, way in product(COLORS, ways)]


def shuffled(keys: Iterable[Key]) -> list[Key]:
    """Combinations in an order by chance that no version of Python changes."""
    return sorted(keys, key=lambda key: hashlib.sha256(repr(("scenes", *key)).encode()).digest())
