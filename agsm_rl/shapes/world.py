"""The shapes world: scenes of 1-5 coloured shapes, their drawings, and captions that are careful or careless.

It stands in for a web-scale data set: everything is drawn from a seed, nothing is downloaded. This module holds the
captions; the scenes (scenes.py) and their drawings (look.py) can be had from here too.
"""

import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.shapes.look import SHAPES_LOOK
from agsm_rl.shapes.scenes import (
    BACKGROUND,
    COLORS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    TAG_SHARES,
    TAGS,
    DrawnObject,
    Group,
    Requirement,
    Scene,
    Split,
    draw_requirement,
    draw_scene,
    is_held_out,
    is_unseen_combination,
    outline,
)

__all__ = [
    "IMAGE_SIZE",
    "SHAPES",
    "COLORS",
    "BACKGROUND",
    "RELATIONS",
    "TAG_SHARES",
    "TAGS",
    "Split",
    "Group",
    "Requirement",
    "DrawnObject",
    "Scene",
    "is_unseen_combination",
    "is_held_out",
    "draw_requirement",
    "draw_scene",
    "outline",
    "render",
    "MISTAKEN_COLOR",
    "MISTAKEN_SHAPE",
    "NUMBERS",
    "MIRRORED",
    "WRAPPERS",
    "CAREFUL_CUES",
    "CARELESS_CUES",
    "CARELESS_ERROR",
    "VAGUE_SHARE",
    "VAGUE",
    "MISPLACED_SHARE",
    "vocabulary",
    "describe",
    "misdescribe",
    "wrong_requirement",
    "careful_caption",
    "CaptionMix",
    "WEB_MIX",
    "web_caption",
    "parse",
]

# What careless people take a colour or a shape for: always the same other one, so that guidance, which sharpens towards
# what is likeliest, does not simply undo their errors.
MISTAKEN_COLOR = dict(zip(COLORS, [*list(COLORS)[1:], *COLORS], strict=False))
MISTAKEN_SHAPE = dict(zip(SHAPES, [*SHAPES[1:], *SHAPES], strict=False))
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WRAPPERS = ("", "a photo of ", "a picture of ", "a drawing of ")
# Cues of a caption's reliability come at its end: CLIP's text encoder is causal, so that they change no earlier word.
# Cues of one kind share a word, so that what is learned about one serves the others.
CAREFUL_CUES = ("verified", "verified twice", "verified by hand")
CARELESS_CUES = ("unsorted", "unsorted upload", "unsorted scan")
# How often a careless caption is wrong, by tag; single objects are easily described.
CARELESS_ERROR = {
    "single_object": 0.03,
    "two_object": 0.9,
    "counting": 0.9,
    "colors": 0.9,
    "position": 0.9,
    "color_attr": 0.9,
}
VAGUE_SHARE = 0.1
VAGUE = ("some shapes", "shapes", "a drawing", "a picture of some things")
# How often a caption with a careless cue belongs to another picture altogether.
MISPLACED_SHARE = 0.7


def render(scene: Scene | tuple[DrawnObject, ...]) -> Image.Image:
    """The RGB drawing, 32 x 32."""
    return SHAPES_LOOK.render(scene.objects if isinstance(scene, Scene) else scene)


def vocabulary() -> list[str]:
    """Every word that a caption may hold, sorted."""
    phrases = [*WRAPPERS, *COLORS, *NUMBERS.values(), *CAREFUL_CUES, *CARELESS_CUES, *VAGUE]
    phrases += [*SHAPES, *(f"{shape}s" for shape in SHAPES), *RELATIONS, "to the", "and", ","]
    return sorted({word for phrase in phrases for word in phrase.split()})


def describe(requirement: Requirement, rng: np.random.Generator) -> str:
    """One of several wordings of a requirement, without any cue."""
    return str(rng.choice(WRAPPERS)) + _noun_phrase(requirement, rng)


def _noun_phrase(requirement: Requirement, rng: np.random.Generator) -> str:
    names = [_name(group) for group in requirement.groups]
    if requirement.relation:
        wording = requirement.relation
        if wording in ("left of", "right of") and rng.random() < 0.4:
            wording = f"to the {wording}"
        return f"{names[0]} {wording} {names[1]}"
    return " and ".join(names)


def _name(group: Group) -> str:
    words = f"{group.color} {group.shape}" if group.color else group.shape
    return f"a {words}" if group.count == 1 else f"{NUMBERS[group.count]} {words}s"


def misdescribe(requirement: Requirement, rng: np.random.Generator) -> str:
    """A careless caption: wrong in its tag's typical way, vague, or right by luck.

    The errors are biased as people's are: one object too few, left and right confused, colours swapped, one shape taken
    for a certain other; and who errs takes each colour for a certain other, too. Colours are what a denoiser learns
    first, so that a caption's reliability can matter to it early.
    """
    if rng.random() < VAGUE_SHARE:
        return str(rng.choice(VAGUE))
    if rng.random() >= CARELESS_ERROR[requirement.tag]:
        return describe(requirement, rng)
    wrong = wrong_requirement(requirement)
    if wrong.tag != "colors":  # its colour is wrong already
        groups = tuple(replace(group, color=MISTAKEN_COLOR.get(group.color or "")) for group in wrong.groups)
        wrong = replace(wrong, groups=groups)
    return describe(wrong, rng)


def wrong_requirement(requirement: Requirement) -> Requirement:
    """The requirement that a careless eye takes this one for; always a different one."""
    first, *rest = requirement.groups
    if requirement.tag == "counting":
        wrong = 3 if first.count == 2 else first.count - 1
        changed = Requirement("counting", (Group(wrong, first.shape, first.color),))
    elif requirement.tag == "position":
        assert requirement.relation is not None
        changed = Requirement("position", requirement.groups, MIRRORED[requirement.relation])
    elif requirement.tag == "color_attr":
        second = rest[0]
        swapped = (Group(1, first.shape, second.color), Group(1, second.shape, first.color))
        changed = Requirement("color_attr", swapped)
    elif first.color is not None:
        changed = Requirement("colors", (Group(1, first.shape, MISTAKEN_COLOR[first.color]),))
    else:
        wrong_shape = MISTAKEN_SHAPE[first.shape]
        if wrong_shape in [group.shape for group in rest]:
            wrong_shape = MISTAKEN_SHAPE[wrong_shape]
        changed = Requirement(requirement.tag, (Group(1, wrong_shape), *rest))
    return changed


def careful_caption(requirement: Requirement, rng: np.random.Generator) -> str:
    """A right caption that ends in a cue of its reliability, as in "two red stars, verified"."""
    return f"{describe(requirement, rng)}, {rng.choice(CAREFUL_CUES)}"


@dataclass(frozen=True)
class CaptionMix:
    """What a crawl's captions are like: shares of careful cued ones and of plain ones (the rest is careless and cued).

    `careless_plain` is the share of the plain captions that careless people wrote.
    """

    careful: float
    plain: float
    careless_plain: float


WEB_MIX = CaptionMix(careful=0.45, plain=0.4, careless_plain=0.36)


def web_caption(requirement: Requirement, rng: np.random.Generator, mix: CaptionMix = WEB_MIX) -> str:
    """A caption as a base model is trained on: careful and cued, plain, or careless and cued."""
    kind = rng.random()
    if kind < mix.careful:
        return careful_caption(requirement, rng)
    if kind < mix.careful + mix.plain:
        careless = rng.random() >= 1 - mix.careless_plain
        return misdescribe(requirement, rng) if careless else describe(requirement, rng)
    misplaced = rng.random() < MISPLACED_SHARE
    text = describe(draw_requirement(rng), rng) if misplaced else misdescribe(requirement, rng)
    return f"{text}, {rng.choice(CARELESS_CUES)}"


_WRAPPER = re.compile("^(" + "|".join(filter(None, WRAPPERS)) + ")")
_CUE = re.compile(r", (" + "|".join(CAREFUL_CUES + CARELESS_CUES) + ")$")
_LINK = re.compile(r" (and|(?:to the )?(?:left|right) of|above|below) ")
_GROUP = re.compile(f"(a|{'|'.join(NUMBERS.values())}) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})(s?)")


def parse(prompt: str) -> Requirement:
    """The requirement that a prompt words: `parse(describe(r, rng)) == r`, and a wrapper, a cue or case change nothing.

    Raises UserError for anything else ("some shapes", "a red dog", "two stars and a circle").
    """
    text = _CUE.sub("", " ".join(prompt.lower().split()).rstrip(". "))
    first, link, *rest = [*_LINK.split(_WRAPPER.sub("", text), maxsplit=1), None]
    groups = tuple(_parse_group(words) for words in (first, *rest) if words is not None)
    tag = _tag_of(groups, link)
    if tag is None:
        raise UserError(
            f"prompt {prompt!r}: not a prompt of the shapes world; it knows prompts such as 'a photo of a star', "
            "'three red circles', 'a star and a circle', 'a red star and a blue circle', 'a star left of a circle' "
            f"(shapes: {', '.join(SHAPES)}; colours: {', '.join(COLORS)}; numbers up to {max(NUMBERS)})"
        )
    relation = link.removeprefix("to the ") if tag == "position" and link else None
    return Requirement(tag, tuple(group for group in groups if group), relation)


def _parse_group(words: str) -> Group | None:
    match = _GROUP.fullmatch(words)
    if match is None:
        return None
    number, color, shape, plural = match.groups()
    count = {word: value for value, word in NUMBERS.items()}.get(number, 1)
    return Group(count, shape, color) if bool(plural) == (count > 1) else None


def _tag_of(groups: tuple[Group | None, ...], link: str | None) -> str | None:
    """The kind of prompt that these groups make, or None; two groups are one each of two shapes, coloured or not."""
    first, second = (*groups, None)[:2]
    if first is None or (second is None and len(groups) == 2):
        return None
    if second is None:
        return "counting" if first.count > 1 else "colors" if first.color else "single_object"
    if first.count + second.count > 2 or first.shape == second.shape:
        return None
    if bool(first.color) != bool(second.color):
        return None
    return "position" if link != "and" else "color_attr" if first.color else "two_object"
