"""Does a drawing show what its prompt asks for? GenEval's rules (arXiv 2310.11513) on the shapes world.

`correct` is GenEval's lenient verdict: what is asked for is there, whatever else is (only `counting` forbids one more).
`strict` also wants nothing else: no further object and no unclean blob. Reward the strict one: a verdict that tolerates
extras is soon learned to be served with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agsm_rl.shapes.detect import Found, Picture, Rejected, detect
from agsm_rl.shapes.look import SHAPES_LOOK, Look
from agsm_rl.shapes.scenes import Group, Requirement
from agsm_rl.shapes.scenes_world.splits import place_of, size_of

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
FAULTS = ("too_many", "too_few", "wrong_color", "wrong_shape", "wrong_size", "wrong_place", "unclean")
"""What can be wrong with an image; several can be at once."""

POSITION_MARGIN = 0.1
"""Share of the two objects' sizes by which their offset is shrunk before it is read (GenEval's value)."""


@dataclass(frozen=True)
class Verdict:
    """What was found and whether it is what was asked for; `reason` says what is wrong, "" if `strict`."""

    correct: bool
    strict: bool
    reason: str
    objects: tuple[Found, ...]
    rejected: tuple[Rejected, ...]
    faults: tuple[str, ...] = ()
    """Which of FAULTS it has; none if `strict`."""


def judge(image: Picture, requirement: Requirement, look: Look = SHAPES_LOOK) -> Verdict:
    """Judge one image: PIL, uint8 [H, W, 3], or float [3, H, W] in [0, 1]; any size, averaged down to the world's."""
    seen = detect(image, look)
    wrong = [fault for group in requirement.groups if (fault := _missing(group, seen.objects))]
    if requirement.relation and not wrong:
        wrong += _misplaced(requirement, seen.objects)
    if requirement.place and not wrong:
        wrong += _elsewhere(requirement, seen.objects)
    if requirement.tag == "counting":
        wrong += _too_many(requirement.groups[0], seen.objects)
    extra = _extras(requirement, seen.objects, seen.rejected)
    faults = _faults(requirement, seen.objects, seen.rejected) if wrong or extra else ()
    reason = "; ".join(wrong + extra)
    return Verdict(not wrong, not wrong and not extra, reason, seen.objects, seen.rejected, faults)


def relations(a: Found, b: Found) -> frozenset[str]:
    """Where `a` stands relative to `b`: at most one of left/right of and at most one of above/below."""
    offset = np.array([a.x - b.x, a.y - b.y])
    sizes = np.array([a.width + b.width, a.height + b.height])
    shrunk = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0) * np.sign(offset)
    norm = float(np.linalg.norm(offset))
    if norm == 0:
        return frozenset()
    across, down = shrunk / norm
    held = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return frozenset(name for name, holds in held.items() if holds)


def matching(group: Group, objects: Sequence[Found]) -> list[Found]:
    """The objects of the group's shape and, if it names them, colour and size."""
    alike = [item for item in objects if item.shape == group.shape and group.color in (None, item.color)]
    return [item for item in alike if group.size in (None, size_of(item.radius))]


def _missing(group: Group, objects: Sequence[Found]) -> str | None:
    """GenEval's `include`. Any objects that fulfil it count: a template's fit says nothing about which one is meant."""
    found = matching(group, objects)
    if len(found) >= group.count:
        return None
    same = [item for item in objects if item.shape == group.shape and item not in found]
    others = [f"{size_of(item.radius)} {item.color}" if group.size else item.color for item in same]
    instead = f" (and {group.shape}s in {', '.join(others)})" if others else ""
    name = " ".join(word for word in (group.size, group.color, group.shape) if word)
    return f"expected {_some(group.count, name)}, found {len(found)}{instead}"


def _misplaced(requirement: Requirement, objects: Sequence[Found]) -> list[str]:
    first, second = requirement.groups
    pairs = [(a, b) for a in matching(first, objects) for b in matching(second, objects)]
    held = [relations(a, b) for a, b in pairs]
    if any(requirement.relation in names for names in held):
        return []
    is_there = " and ".join(sorted(held[0])) or "neither clearly beside, above nor below"
    return [f"the {first.shape} should be {requirement.relation} the {second.shape}, but is {is_there}"]


def _elsewhere(requirement: Requirement, objects: Sequence[Found]) -> list[str]:
    """Whether the group's object stands in its place of the picture."""
    group = requirement.groups[0]
    places = [place_of(item.x, item.y) for item in matching(group, objects)]
    if requirement.place in places:
        return []
    return [f"the {group.shape} should be at: {requirement.place}, but is at: {' and '.join(places)}"]


def _faults(requirement: Requirement, objects: Sequence[Found], rejected: Sequence[Rejected]) -> tuple[str, ...]:
    """The kinds of what is wrong, each told apart from the others: a red star too large is no missing star.

    Numbers are of all clean objects, whatever they are. Colours and sizes are wrong if as many of the shape as wanted
    are there, or none is missing for another shape's sake, but not in the colour or size that was asked for.
    """
    groups = requirement.groups
    wanted = sum(group.count for group in groups)
    shapes = {group.shape for group in groups}

    def lacks(part: str) -> bool:
        """Whether objects of a wanted shape differ from their group in this part, and the group needs them."""
        for group in groups:
            asked = getattr(group, part)
            alike = [item for item in objects if item.shape == group.shape]
            right = [item for item in alike if asked in (None, size_of(item.radius) if part == "size" else item.color)]
            if len(right) < min(group.count, len(alike)):
                return True
        return False

    present = all(matching(group, objects) for group in groups)
    misplaced = bool(requirement.relation) and bool(_misplaced(requirement, objects)) if present else False
    elsewhere = bool(requirement.place) and bool(_elsewhere(requirement, objects)) if present else False
    held = {
        "too_many": len(objects) > wanted,
        "too_few": len(objects) < wanted,
        "wrong_color": lacks("color"),
        "wrong_shape": any(item.shape not in shapes for item in objects)
        or any(not [item for item in objects if item.shape == shape] for shape in shapes)
        and len(objects) >= wanted,
        "wrong_size": lacks("size"),
        "wrong_place": misplaced or elsewhere,
        "unclean": bool(rejected),
    }
    return tuple(name for name in FAULTS if held[name])


def _too_many(group: Group, objects: Sequence[Found]) -> list[str]:
    """GenEval's `exclude`: it counts the shape in every colour."""
    found = sum(item.shape == group.shape for item in objects)
    return [f"expected {_some(group.count, group.shape)}, found {found}"] if found > group.count else []


def _extras(requirement: Requirement, objects: Sequence[Found], rejected: Sequence[Rejected]) -> list[str]:
    """What else is in the image: objects beyond the required number of their kind, and every unclean blob."""
    left = list(objects)
    for group in requirement.groups:
        for item in matching(group, left)[: group.count]:
            left.remove(item)
    extra = [f"an extra {item.color} {item.shape}" for item in left]
    return extra + [f"something unclean at ({blob.x:.0f}, {blob.y:.0f}): {blob.reason}" for blob in rejected]


def _some(count: int, name: str) -> str:
    return f"{NUMBERS.get(count, count)} {name}{'s' if count > 1 else ''}"
