"""The shapes world keeps its promises: right captions, wrong ones that are wrong, and nothing held out in training."""

from collections import Counter

import numpy as np
import pytest

from agsm_rl.errors import UserError
from agsm_rl.shapes import world
from agsm_rl.shapes.world import Group, Requirement


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def requirements(rng: np.random.Generator, split: world.Split, num: int) -> list[Requirement]:
    return [world.draw_requirement(rng, split, world.TAGS[i % len(world.TAGS)]) for i in range(num)]


@pytest.mark.parametrize("split", ["train", "validation", "held_out"])
def test_parsing_a_prompt_gives_its_requirement_back(rng, split) -> None:
    for requirement in requirements(rng, split, 600):
        assert world.parse(world.describe(requirement, rng)) == requirement


def test_wrapper_case_cue_and_to_the_left_of_change_nothing() -> None:
    plain = world.parse("a red star left of a blue circle")
    assert plain == Requirement("position", (Group(1, "star", "red"), Group(1, "circle", "blue")), "left of")
    for wording in (
        "A Photo of a RED star  to the left of a blue circle, verified",
        "a drawing of a red star left of a blue circle, unsorted upload",
        " a red star left of a blue circle.",
    ):
        assert world.parse(wording) == plain


@pytest.mark.parametrize(
    "prompt",
    ["", "some shapes", "a drawing", "a red dog", "two star", "a stars", "six red stars", "a pink star"]
    + ["two red stars and a circle", "a star and a star", "a red star and a circle", "a star, a circle"],
)
def test_what_is_no_prompt_of_this_world_is_refused_by_name(prompt) -> None:
    with pytest.raises(UserError, match="not a prompt of the shapes world") as error:
        world.parse(prompt)
    assert repr(prompt) in str(error.value)


def test_training_images_never_show_an_unseen_combination(rng) -> None:
    for requirement in requirements(rng, "train", 300):
        scene = world.draw_scene(rng, requirement)
        kinds = [(item.color, item.shape) for item in scene.objects]
        for color, shape in kinds:
            assert not world.is_unseen_combination(kinds.count((color, shape)), color, shape)


def test_some_combinations_are_held_out_for_every_count() -> None:
    for count in world.NUMBERS:
        unseen = [world.is_unseen_combination(count, color, shape) for color in world.COLORS for shape in world.SHAPES]
        assert 0 < sum(unseen) < len(unseen) / 2


def test_train_and_held_out_requirements_are_disjoint_but_for_single_objects(rng) -> None:
    train, held_out = (set(requirements(rng, split, 1200)) for split in ("train", "held_out"))
    assert {requirement.tag for requirement in held_out} == set(world.TAGS)
    assert {requirement.tag for requirement in train & held_out} <= {"single_object"}


def test_a_wrong_requirement_always_differs_and_can_be_worded_and_drawn(rng) -> None:
    for requirement in requirements(rng, "train", 300):
        wrong = world.wrong_requirement(requirement)
        assert wrong != requirement
        assert world.parse(world.describe(wrong, rng)) == wrong
        assert world.draw_scene(rng, wrong, allow_unseen=True).requirement == wrong


@pytest.mark.parametrize("tag", world.TAGS)
def test_a_requirement_has_several_wordings(rng, tag) -> None:
    requirement = world.draw_requirement(rng, "train", tag)
    assert len({world.describe(requirement, rng) for _ in range(60)}) >= len(world.WRAPPERS)


def test_scenes_hold_exactly_what_is_required_inside_the_canvas_and_apart(rng) -> None:
    for requirement in requirements(rng, "held_out", 300):
        objects = world.draw_scene(rng, requirement, allow_unseen=True).objects
        assert len(objects) == sum(group.count for group in requirement.groups)
        for group in requirement.groups:
            matching = [item for item in objects if item.shape == group.shape and group.color in (None, item.color)]
            assert len(matching) == group.count
        for i, item in enumerate(objects):
            assert item.radius <= min(item.x, item.y, 32 - item.x, 32 - item.y)
            for other in objects[:i]:
                assert np.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius


def test_objects_overlap_when_asked_to(rng) -> None:
    requirement = Requirement("counting", (Group(5, "star", "red"),))
    closest = []
    for _ in range(20):
        objects = world.draw_scene(rng, requirement, allow_unseen=True, overlap=True).objects
        gaps = [np.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius for a in objects for b in objects if a is not b]
        closest.append(min(gaps))
    assert min(closest) < 0


def test_the_careless_caption_is_often_wrong_and_the_careful_one_never(rng) -> None:
    wrong = 0
    for requirement in requirements(rng, "train", 300):
        assert world.parse(world.careful_caption(requirement, rng)) == requirement
        try:
            wrong += world.parse(world.misdescribe(requirement, rng)) != requirement
        except UserError:
            wrong += 1
    assert 0.4 < wrong / 300 < 0.8


def test_careful_captions_are_right_and_plain_ones_of_the_hard_kinds_are_often_wrong(rng) -> None:
    counts: Counter[tuple[str, bool]] = Counter()
    for requirement in requirements(rng, "train", 3000):
        caption = world.web_caption(requirement, rng)
        kind = next((kind for kind in ("verified", "unsorted") if kind in caption), "plain")
        if requirement.tag != "single_object":
            counts[kind, caption_is_right(caption, requirement)] += 1
    right = {kind: counts[kind, True] / (counts[kind, True] + counts[kind, False]) for kind in ("verified", "plain")}
    assert right["verified"] == 1
    assert 0.45 < right["plain"] < 0.65
    assert counts["unsorted", False] > 5 * counts["unsorted", True]


def caption_is_right(caption: str, requirement: world.Requirement) -> bool:
    try:
        return world.parse(caption) == requirement
    except UserError:  # a vague caption
        return False


def test_every_word_of_a_caption_is_in_the_vocabulary(rng) -> None:
    known = set(world.vocabulary())
    for requirement in requirements(rng, "train", 500):
        words = world.web_caption(requirement, rng).replace(",", " ,").split()
        assert set(words) <= known
