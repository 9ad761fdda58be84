"""What prompts ask for: prompts of one requirement differ in their wording only, so that they count as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from agsm_rl.errors import UserError
from agsm_rl.shapes.scenes import Requirement
from agsm_rl.shapes.scenes_world.captions import parse as parse_scenes
from agsm_rl.shapes.scenes_world.splits import key_of
from agsm_rl.shapes.world import parse as parse_shapes

OPPOSITE = {"right of": "left of", "below": "above"}


def _asked_for(requirement: Requirement) -> Hashable:
    """A requirement of the shapes world in one order: "a star and a circle" is "a circle and a star"."""
    groups, relation = requirement.groups, requirement.relation
    if relation is None:
        return requirement.tag, frozenset(groups)
    if relation in OPPOSITE:
        groups, relation = groups[::-1], OPPOSITE[relation]
    return requirement.tag, groups, relation


PARSERS: dict[str, Callable[[str], Hashable]] = {
    "shapes": lambda prompt: _asked_for(parse_shapes(prompt)),
    "scenes": lambda prompt: key_of(parse_scenes(prompt)),
}
"""By the suite of a drawn world. A wrapper ("a photo of") and a cue change nothing."""


def requirements_of(suite: str, prompts: Sequence[str]) -> tuple[Hashable, ...] | None:
    """Each prompt's requirement, if one of the drawn worlds words all of them, the suite's own first; else None."""
    for name in sorted(PARSERS, key=lambda name: name != suite):
        try:
            known = {prompt: PARSERS[name](prompt) for prompt in dict.fromkeys(prompts)}
        except UserError:
            continue
        return tuple(known[prompt] for prompt in prompts)
    return None
