"""Does a drawing show what its prompt asks for? GenEval's rules (arXiv 2310.11513) on the shapes world.

`correct` is GenEval's lenient verdict: what is asked for is there, whatever else is (only `counting` forbids one more).
`strict` also wants nothing else: no further object and no unclean blob. Reward the strict one: a verdict that tolerates
extras is soon learned to be served with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agsm_rl.shapes.detect import Found, Picture, Rejected, detect
from agsm_rl.shapes.world import NUMBERS, Group, Requirement

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


def judge(image: Picture, requirement: Requirement) -> Verdict:
    """Judge one image: PIL, uint8 [H, W, 3], or float [3, H, W] in [0, 1]; any size, averaged down to 32 x 32."""
    seen = detect(image)
    wrong = [fault for group in requirement.groups if (fault := _missing(group, seen.objects))]
    if requirement.relation and not wrong:
        wrong += _misplaced(requirement, seen.objects)
    if requirement.tag == "counting":
        wrong += _too_many(requirement.groups[0], seen.objects)
    extra = _extras(requirement, seen.objects, seen.rejected)
    return Verdict(not wrong, not wrong and not extra, "; ".join(wrong + extra), seen.objects, seen.rejected)


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
    """The objects of the group's shape and, if it names one, colour."""
    return [item for item in objects if item.shape == group.shape and group.color in (None, item.color)]


def _missing(group: Group, objects: Sequence[Found]) -> str | None:
    """GenEval's `include`. Any objects that fulfil it count: a template's fit says nothing about which one is meant."""
    found = matching(group, objects)
    if len(found) >= group.count:
        return None
    others = [item.color for item in objects if item.shape == group.shape and item not in found]
    instead = f" (and {group.shape}s in {', '.join(others)})" if others else ""
    name = f"{group.color} {group.shape}" if group.color else group.shape
    return f"expected {_some(group.count, name)}, found {len(found)}{instead}"


def _misplaced(requirement: Requirement, objects: Sequence[Found]) -> list[str]:
    first, second = requirement.groups
    pairs = [(a, b) for a in matching(first, objects) for b in matching(second, objects)]
    held = [relations(a, b) for a, b in pairs]
    if any(requirement.relation in names for names in held):
        return []
    is_there = " and ".join(sorted(held[0])) or "neither clearly beside, above nor below"
    return [f"the {first.shape} should be {requirement.relation} the {second.shape}, but is {is_there}"]


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
