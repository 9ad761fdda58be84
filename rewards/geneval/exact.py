"""Flow-GRPO's verdict by GenEval's rules (arXiv 2505.05470): exact counts, and a score between right and wrong.

Its reward server asks for exactly `count` objects of each class where GenEval asks for at least that many, and trains
on a score that grows with what is right. Uses no models and no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agsm_rl_rewards.geneval.rules import GENEVAL, Detection, Rules, confident, relations


@dataclass(frozen=True)
class Exact:
    """`correct`: all that was asked for is there in exactly that number. `fraction`: Flow-GRPO's training score."""

    correct: bool
    fraction: float


def exact(detections: Sequence[Detection], asked: Mapping[str, Any], rules: Rules = GENEVAL) -> Exact:
    """The verdict on an image with these detections, in any order.

    `fraction` is the mean over parts: for each object of `include` 1 − |count − found| / count; for its colour, the
    same with those of that colour, or 0 if their number is already wrong; for its position, as published, 1, and
    another part of 0 if it does not hold. It is at most 1 and, with far too many objects, below 0.

    ValueError if the prompt asks for a colour and a detection that decides it was not classified.
    """
    objects = confident(detections, asked["tag"], rules)
    parts: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for wanted in asked.get("include", []):
        group, count = objects.get(wanted["class"], []), wanted["count"]
        parts.append(_closeness(len(group), count))
        is_right = len(group) == count
        if not is_right:
            parts += [0.0] if "color" in wanted or "position" in wanted else []
        else:
            if "color" in wanted:
                number = _number_of(wanted["color"], group)
                parts.append(_closeness(number, count))
                is_right = number == count
            if "position" in wanted and is_right:
                is_right, scores = _positioned(group, wanted["position"], groups, rules)
                parts += scores
        groups.append(group if is_right else None)
    return Exact(None not in groups, sum(parts) / len(parts) if parts else 0.0)


def _closeness(number: int, count: int) -> float:
    return 1 - abs(count - number) / count


def _number_of(color: str, group: Sequence[Detection]) -> int:
    colors = [item.color for item in group]
    if None in colors:
        raise ValueError(f"the prompt asks for the colour of a {group[0].name}, but it was not classified")
    return colors.count(color)


def _positioned(
    group: Sequence[Detection], position: Sequence[Any], groups: Sequence[Sequence[Detection] | None], rules: Rules
) -> tuple[bool, list[float]]:
    """Whether all objects have the relation to all of the earlier group, and the parts of the score."""
    relation, index = position
    targets = groups[index]
    if targets is None:
        return False, [0.0]
    holds = all(relation in relations(item.box, target.box, rules) for item in group for target in targets)
    return holds, [1.0] if holds else [0.0, 1.0]
