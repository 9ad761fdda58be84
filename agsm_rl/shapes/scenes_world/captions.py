"""The words of the scenes world: careful captions, careless ones, and captions that are true but leave things out.

Captions as in COCO say what is there without saying how many, how large or where, and often pass over an object. A
model that learns from them is told nothing wrong, and little about what GenEval asks.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from agsm_rl.errors import UserError
from agsm_rl.shapes.scenes import Group, Requirement
from agsm_rl.shapes.scenes_world import splits
from agsm_rl.shapes.scenes_world.requirements import can_be_seen, draw_requirement
from agsm_rl.shapes.scenes_world.splits import COLORS, MIRRORED, PLACES, SHAPES, SIZES

WRAPPERS = ("", "a photo of ", "a picture of ", "a drawing of ")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
# Cues of a caption's reliability come at its end: CLIP's text encoder is causal, so that they change no earlier word.
CAREFUL_CUES = ("verified", "verified twice", "verified by hand")
CARELESS_CUES = ("unsorted", "unsorted upload", "unsorted scan")
# What careless people take a colour or a shape for: always the same other one.
MISTAKEN_COLOR = dict(zip(COLORS, [*COLORS[1:], COLORS[0]], strict=True))
MISTAKEN_SHAPE = dict(zip(SHAPES, [*SHAPES[1:], SHAPES[0]], strict=True))
CARELESS_ERROR = 0.9
"""How often a careless caption is wrong; single objects are easily described."""
CARELESS_SINGLE_ERROR = 0.03
VAGUE_SHARE = 0.1
VAGUE = ("some shapes", "shapes", "a drawing", "a picture of some shapes")
MISPLACED_SHARE = 0.7
"""How often a caption with a careless cue belongs to another picture altogether."""


def vocabulary() -> list[str]:
    """Every word that a caption may hold, sorted."""
    phrases = [*WRAPPERS, *COLORS, *SIZES, *PLACES, *NUMBERS.values(), *CAREFUL_CUES, *CARELESS_CUES, *VAGUE]
    phrases += [*SHAPES, *(_plural(shape) for shape in SHAPES), *MIRRORED, "at in to the", "an and", ","]
    return sorted({word for phrase in phrases for word in phrase.split()})


def describe(requirement: Requirement, rng: np.random.Generator) -> str:
    """One of several wordings of a requirement, without any cue."""
    return str(rng.choice(WRAPPERS)) + _phrase(requirement)


def _phrase(requirement: Requirement) -> str:
    names = [_name(group) for group in requirement.groups]
    if requirement.relation:
        return f"{names[0]} {requirement.relation} {names[1]}"
    if requirement.place:
        return f"{names[0]} {_at(requirement.place)}"
    return " and ".join(names)


def _name(group: Group) -> str:
    words = " ".join(word for word in (group.size, group.color, group.shape) if word)
    if group.count > 1:
        return f"{NUMBERS[group.count]} {_plural(words)}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _plural(words: str) -> str:
    return f"{words}es" if words.endswith("cross") else f"{words}s"


def singular(word: str) -> str:
    """A shape's name as it is of one; any other word as it is."""
    return next((shape for shape in SHAPES if word == _plural(shape)), word)


def _at(place: str) -> str:
    return "in the middle" if place == "middle" else f"at the {place}"


def misdescribe(requirement: Requirement, rng: np.random.Generator) -> str:
    """A careless caption: wrong in its tag's typical way, vague, or right by luck.

    The errors are biased as people's are: one object too few, left and right confused, colours swapped, one shape or
    colour taken for a certain other. None of them words a requirement that is held out.
    """
    if rng.random() < VAGUE_SHARE:
        return str(rng.choice(VAGUE))
    error = CARELESS_SINGLE_ERROR if requirement.tag == "single_object" else CARELESS_ERROR
    if rng.random() >= error:
        return describe(requirement, rng)
    wrong = wrong_requirement(requirement)
    if wrong.tag in ("counting", "color_attr"):
        groups = tuple(replace(group, color=MISTAKEN_COLOR[str(group.color)]) for group in wrong.groups)
        wrong = replace(wrong, groups=groups)
    unseen = splits.split_of(requirement) == "train" and not can_be_seen(wrong)
    return str(rng.choice(VAGUE)) if unseen else describe(wrong, rng)


def wrong_requirement(requirement: Requirement) -> Requirement:
    """The requirement that a careless eye takes this one for; always a different one of the same tag."""
    first, *rest = requirement.groups
    if requirement.tag == "counting":
        return replace(requirement, groups=(replace(first, count=3 if first.count == 2 else first.count - 1),))
    if requirement.tag == "colors":
        return replace(requirement, groups=(replace(first, color=MISTAKEN_COLOR[str(first.color)]),))
    if requirement.tag == "position":
        return replace(requirement, relation=MIRRORED[str(requirement.relation)])
    if requirement.tag == "color_attr":
        swapped = (replace(first, color=rest[0].color), replace(rest[0], color=first.color))
        return replace(requirement, groups=swapped)
    shape = MISTAKEN_SHAPE[first.shape]
    if shape in [group.shape for group in rest]:
        shape = MISTAKEN_SHAPE[shape]
    return replace(requirement, groups=(replace(first, shape=shape), *rest))


def leave_out(requirement: Requirement, rng: np.random.Generator) -> str:
    """A caption as in COCO: true, without numbers, sizes, places and most colours, and often without an object."""
    first, *rest = requirement.groups
    bare = [
        replace(group, size=None, color=group.color if rng.random() < 0.3 else None) for group in requirement.groups
    ]
    if first.count > 1:
        words = " ".join(word for word in (bare[0].color, first.shape) if word)
        text = str(rng.choice(["", "some "])) + _plural(words)
    elif rest and rng.random() < 0.5:
        text = " and ".join(_name(group) for group in bare)
    else:
        text = _name(bare[int(rng.integers(len(bare)))])
    return str(rng.choice(WRAPPERS)) + text


def careful_caption(requirement: Requirement, rng: np.random.Generator) -> str:
    """A right caption that ends in a cue of its reliability, as in "two red stars, verified"."""
    return f"{describe(requirement, rng)}, {rng.choice(CAREFUL_CUES)}"


def careless_caption(requirement: Requirement, rng: np.random.Generator) -> str:
    """A careless caption that ends in a cue of it: mostly another picture's."""
    misplaced = rng.random() < MISPLACED_SHARE
    text = describe(draw_requirement(rng), rng) if misplaced else misdescribe(requirement, rng)
    return f"{text}, {rng.choice(CARELESS_CUES)}"


@dataclass(frozen=True)
class Mix:
    """What captions a base is trained on: shares of careful ones with their cue and of plain ones; the rest is cued
    as careless. Of the plain ones, a share is careless and a share leaves things out."""

    careful: float = 0.50
    plain: float = 0.40
    careless_plain: float = 0.40
    coco_plain: float = 0.15


def mixed_caption(requirement: Requirement, rng: np.random.Generator, mix: Mix | None = None) -> str:
    """A caption as a base is trained on: careful and cued, plain (right, careless, incomplete), or cued as careless."""
    mix = mix or Mix()
    kind, plain = rng.random(), rng.random()
    if kind < mix.careful:
        return careful_caption(requirement, rng)
    if kind >= mix.careful + mix.plain:
        return careless_caption(requirement, rng)
    if plain < mix.careless_plain:
        return misdescribe(requirement, rng)
    return (leave_out if plain < mix.careless_plain + mix.coco_plain else describe)(requirement, rng)


WORDINGS: dict[str, Callable[[Requirement, np.random.Generator], str]] = {
    "plain": describe,
    "careful": careful_caption,
    "careless": misdescribe,
    "coco": leave_out,
    "mixed": mixed_caption,
}
"""The kinds of captions that a data set may have."""

_WRAPPER = re.compile("^(" + "|".join(filter(None, WRAPPERS)) + ")")
_CUE = re.compile(r", (" + "|".join(CAREFUL_CUES + CARELESS_CUES) + ")$")
_LINK = re.compile(r" (and|(?:to the )?(?:left|right) of|above|below) ")
_PLACE = re.compile(r" (?:at the|in the) (" + "|".join(sorted(PLACES, key=len, reverse=True)) + ")$")
_GROUP = re.compile(
    f"(an?|{'|'.join(NUMBERS.values())}) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})(e?s)?"
)


def parse(prompt: str) -> Requirement:
    """The requirement that a prompt words: `parse(describe(r, rng)) == r`; a wrapper, a cue or case change nothing.

    Raises UserError for anything else ("some stars", "a red dog", "two stars and a circle").
    """
    text = _WRAPPER.sub("", _CUE.sub("", " ".join(prompt.lower().split()).rstrip(". ")))
    at = _PLACE.search(text)
    first, link, *rest = [*_LINK.split(_PLACE.sub("", text), maxsplit=1), None]
    groups = [_parse_group(words) for words in (first, *rest) if words is not None]
    requirement = _requirement(groups, link, at.group(1) if at else None)
    if requirement is None:
        raise UserError(
            f"prompt {prompt!r}: not a prompt of the scenes world; it knows prompts such as 'a photo of a small star "
            "at the top left', 'three red circles', 'a large red heart', 'a small red star and a circle', 'a red star "
            f"and a blue circle', 'a red star left of a circle' (shapes: {', '.join(SHAPES)}; "
            f"colours: {', '.join(COLORS)}; sizes: {', '.join(SIZES)}; numbers up to {max(NUMBERS)})"
        )
    return requirement


def _parse_group(words: str) -> Group | None:
    match = _GROUP.fullmatch(words)
    if match is None:
        return None
    number, size, color, shape, plural = match.groups()
    count = {word: value for value, word in NUMBERS.items()}.get(number, 1)
    right = (plural or "") == (_plural(shape).removeprefix(shape) if count > 1 else "")
    return Group(count, shape, color, size) if right else None


def _requirement(groups: list[Group | None], link: str | None, place: str | None) -> Requirement | None:
    """What these groups ask for, or None."""
    known = tuple(group for group in groups if group is not None)
    if not known or len(known) < len(groups):
        return None
    first = known[0]
    if len(known) == 1:
        if place and (first.count > 1 or first.color):
            return None
        if first.count > 1:
            return None if first.size or not first.color else Requirement("counting", known)
        return Requirement("colors" if first.color else "single_object", known, place=place)
    second = known[1]
    if place or first.count + second.count > 2 or first.shape == second.shape or second.size:
        return None
    if link != "and":
        relation = str(link).removeprefix("to the ")
        return None if second.color or first.size else Requirement("position", known, relation)
    if second.color:
        clear = first.color and first.color != second.color and not first.size
        return Requirement("color_attr", known) if clear else None
    return Requirement("two_object", known)
