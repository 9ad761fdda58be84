"""The drawn worlds: `SHAPES`, which the bases shapes-* were trained on, and the richer `SCENES`.

A world is what a data set, a judge, a suite and the training of a base need to know of it; everything else is shared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from agsm_rl.shapes import world as shapes_world
from agsm_rl.shapes.detect import Picture
from agsm_rl.shapes.judge import Verdict
from agsm_rl.shapes.judge import judge as judge_picture
from agsm_rl.shapes.look import SHAPES_LOOK, Look
from agsm_rl.shapes.scenes import Requirement, Scene, Split
from agsm_rl.shapes.scenes_world import captions as scenes_captions
from agsm_rl.shapes.scenes_world import requirements as scenes_requirements

Wording = Callable[[Requirement, np.random.Generator], str]


class DrawRequirement(Protocol):
    """Draws a requirement of a split; of one tag, if given."""

    def __call__(self, rng: np.random.Generator, split: Split = "train", tag: str | None = None) -> Requirement: ...


class DrawScene(Protocol):
    """Draws a scene that fulfils a requirement; nothing held out is in it unless `allow_unseen`."""

    def __call__(self, rng: np.random.Generator, requirement: Requirement, *, allow_unseen: bool = False) -> Scene: ...


@dataclass(frozen=True)
class World:
    """A drawn world.

    Attributes:
        name: Its name, also of its suite and in `builtin:NAME`, `builtin:NAME-prompts` and `builtin:NAME-preferences`.
        look: Shapes, colours and size of a drawing.
        tags: GenEval's kinds of prompts, in order.
        text_length: Tokens that a base of this world reads.
        cues: Phrases after a caption that tell careful from careless ones, the careful ones first.
        wordings: How captions may be written, by name.
        draw_requirement: Draws what a prompt asks for.
        requirements_of: Every requirement of a split and tag; none where they are drawn freely.
        draw_scene: Draws objects that fulfil it.
        can_be_seen: Whether a requirement and a drawing of it may occur in training.
        splits_seen: The splits whose requirements training shows.
        wrong_requirement: What a careless eye takes a requirement for.
        base_caption: A caption as the bases are trained on; the number is the share of careless ones among plain ones.
        parse: The requirement that a prompt words; UserError for a prompt outside the world.
        vocabulary: Every word that a caption may hold.
    """

    name: str
    look: Look
    tags: tuple[str, ...]
    text_length: int
    cues: tuple[str, ...]
    wordings: Mapping[str, Wording]
    draw_requirement: DrawRequirement
    requirements_of: Callable[[Split, str], tuple[Requirement, ...]]
    draw_scene: DrawScene
    can_be_seen: Callable[[Requirement], bool]
    splits_seen: tuple[Split, ...]
    wrong_requirement: Callable[[Requirement], Requirement]
    base_caption: Callable[[Requirement, np.random.Generator, float | None], str]
    parse: Callable[[str], Requirement]
    vocabulary: Callable[[], list[str]]

    def describe(self, requirement: Requirement, rng: np.random.Generator) -> str:
        """One of several wordings of a requirement, without any cue."""
        return self.wordings["plain"](requirement, rng)

    def render(self, scene: Scene) -> Image.Image:
        """The drawing of a scene."""
        return self.look.render(scene.objects)

    def judge(self, image: Picture, requirement: Requirement) -> Verdict:
        """Whether an image shows what a requirement asks for."""
        return judge_picture(image, requirement, self.look)


def _shapes_caption(requirement: Requirement, rng: np.random.Generator, careless_plain: float | None) -> str:
    mix = shapes_world.WEB_MIX
    share = mix.careless_plain if careless_plain is None else careless_plain
    return shapes_world.web_caption(requirement, rng, shapes_world.CaptionMix(mix.careful, mix.plain, share))


def _scenes_caption(requirement: Requirement, rng: np.random.Generator, careless_plain: float | None) -> str:
    mix = scenes_captions.Mix() if careless_plain is None else scenes_captions.Mix(careless_plain=careless_plain)
    return scenes_captions.mixed_caption(requirement, rng, mix)


SHAPES = World(
    name="shapes",
    look=SHAPES_LOOK,
    tags=shapes_world.TAGS,
    text_length=20,
    cues=(*shapes_world.CAREFUL_CUES, *shapes_world.CARELESS_CUES),
    wordings={
        "plain": shapes_world.describe,
        "careful": shapes_world.careful_caption,
        "web": shapes_world.web_caption,
    },
    draw_requirement=shapes_world.draw_requirement,
    requirements_of=lambda split, tag: (),
    draw_scene=shapes_world.draw_scene,
    can_be_seen=lambda requirement: not shapes_world.is_held_out(requirement),
    splits_seen=("train", "validation"),
    wrong_requirement=shapes_world.wrong_requirement,
    base_caption=_shapes_caption,
    parse=shapes_world.parse,
    vocabulary=shapes_world.vocabulary,
)
SCENES = World(
    name="scenes",
    look=scenes_requirements.LOOK,
    tags=scenes_requirements.TAGS,
    text_length=16,
    cues=(*scenes_captions.CAREFUL_CUES, *scenes_captions.CARELESS_CUES),
    wordings=scenes_captions.WORDINGS,
    draw_requirement=scenes_requirements.draw_requirement,
    requirements_of=scenes_requirements.requirements_of,
    draw_scene=scenes_requirements.draw_scene,
    can_be_seen=scenes_requirements.can_be_seen,
    splits_seen=("train",),
    wrong_requirement=scenes_captions.wrong_requirement,
    base_caption=_scenes_caption,
    parse=scenes_captions.parse,
    vocabulary=scenes_captions.vocabulary,
)
WORLDS = {world.name: world for world in (SHAPES, SCENES)}
