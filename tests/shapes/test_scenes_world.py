"""The scenes world keeps its promises: an exact judge, captions of every kind, and nothing held out in training."""

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest

from agsm_rl.errors import UserError
from agsm_rl.shapes import data
from agsm_rl.shapes.scenes import DrawnObject, Group, Requirement
from agsm_rl.shapes.scenes_world import captions, splits
from agsm_rl.shapes.scenes_world.requirements import TAG_SHARES, draw_requirement, draw_scene
from agsm_rl.shapes.worlds import SCENES, SHAPES

SPLITS = ("train", "validation", "held_out")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def requirements(rng, split, num) -> list[Requirement]:
    return [draw_requirement(rng, split, SCENES.tags[i % len(SCENES.tags)]) for i in range(num)]


def judged(prompt: str, *objects: tuple[str, str, float, float, float]):
    """The verdict on a drawing of (colour, shape, x, y, radius)."""
    drawn = tuple(DrawnObject(shape, color, x, y, radius) for color, shape, x, y, radius in objects)
    return SCENES.judge(SCENES.look.render(drawn), SCENES.parse(prompt))


def test_the_world_is_larger_than_the_old_one() -> None:
    assert len(SCENES.look.shapes) >= 8 and len(SCENES.look.colors) >= 8
    assert set(SHAPES.look.shapes) < set(SCENES.look.shapes)


def test_995_of_1000_drawings_are_judged_right_and_no_drawing_of_something_else_is(rng) -> None:
    right, mistaken = [], 0
    for index in range(400):
        split = SPLITS[index % 3]
        requirement = draw_requirement(rng, split, SCENES.tags[index % 6])
        image = SCENES.render(draw_scene(rng, requirement, allow_unseen=split != "train"))
        verdict = SCENES.judge(image, requirement)
        right.append(verdict.strict and verdict.correct and not verdict.faults)
        mistaken += SCENES.judge(image, SCENES.wrong_requirement(requirement)).correct
    assert np.mean(right) >= 0.995 and mistaken == 0


@pytest.mark.parametrize("split", SPLITS)
def test_parsing_a_prompt_gives_its_requirement_back(rng, split) -> None:
    for requirement in requirements(rng, split, 300):
        assert SCENES.parse(SCENES.describe(requirement, rng)) == requirement
        assert SCENES.parse(captions.careful_caption(requirement, rng)) == requirement


@pytest.mark.parametrize(
    "prompt",
    ["", "some stars", "stars", "a red dog", "two star", "two red crosss", "five red stars", "two large red stars"]
    + ["a star and a star", "a star and a red circle", "a red star at the top", "a small star left of a circle"],
)
def test_what_is_not_a_prompt_of_this_world_is_refused_by_name(prompt) -> None:
    with pytest.raises(UserError, match="not a prompt of the scenes world") as error:
        SCENES.parse(prompt)
    assert repr(prompt) in str(error.value)


def test_each_tag_has_twenty_requirements_to_validate_on_and_twenty_others_to_test() -> None:
    counts = Counter((key[0], split) for key, split in splits.held_out().items())
    assert set(counts) == {(tag, split) for tag in SCENES.tags for split in ("validation", "held_out")}
    assert min(counts.values()) >= 20


def test_training_neither_asks_for_nor_shows_a_held_out_combination(rng) -> None:
    unseen, seen = splits.held_out(), Counter()
    for requirement in requirements(rng, "train", 900):
        objects = draw_scene(rng, requirement).objects
        kinds = [(splits.size_of(item.radius), item.color, item.shape) for item in objects]
        assert splits.key_of(requirement) not in unseen
        assert not splits.shows_unseen_kinds(kinds) and not splits.shows_unseen_places(objects)
        for kind in ("misdescribe", "careful_caption", "careless_caption", "leave_out", "mixed_caption"):
            caption = getattr(captions, kind)(requirement, rng)
            try:
                asked = SCENES.parse(caption)
            except UserError:
                continue
            of_each = [("colors", group.size, group.color, group.shape) for group in asked.groups]
            assert not {splits.key_of(asked), *of_each} & set(unseen), caption
        seen.update({requirement.tag, *(part for kind in kinds for part in kind)})
    assert {*SCENES.tags, *splits.SIZES, *splits.COLORS, *splits.SHAPES} <= set(seen)


def test_training_shows_every_pair_and_every_arrangement_in_several_colors() -> None:
    """A base learns that what it never sees is impossible, whatever the words say (docs/scenes.md)."""
    unseen, shapes = splits.held_out(), list(permutations(splits.SHAPES, 2))
    known = {}
    for size, (a, b) in product(splits.SIZES, shapes):
        colors = [color for color in splits.COLORS if ("colors", size, color, a) not in unseen]
        known["two_object", size, a, b] = [("two_object", size, color, a, b) for color in colors]
    for (a, b), relation in product(shapes, splits.MIRRORED):
        known["position", a, relation, b] = [("position", color, a, relation, b) for color in splits.COLORS]
    shown = {of: sum(key not in unseen for key in keys) for of, keys in known.items()}
    assert min(number for of, number in shown.items() if of[0] == "two_object") >= 3
    assert min(number for of, number in shown.items() if of[0] == "position") >= 7
    assert sum(len(keys) - shown[of] for of, keys in known.items()) == 80  # each held-out one is found among these


def test_training_also_asks_for_pairs_and_arrangements_without_a_color(rng) -> None:
    for tag in ("two_object", "position"):
        asked = Counter(draw_requirement(rng, "train", tag).groups[0].color is None for _ in range(400))
        assert 0.25 < asked[True] / 400 < 0.35
        assert all(draw_requirement(rng, "validation", tag).groups[0].color for _ in range(50))


def test_each_tag_has_its_share_of_what_is_drawn_for_training(rng) -> None:
    tags = Counter(draw_requirement(rng).tag for _ in range(2000))
    assert {tag: tags[tag] / 2000 for tag in SCENES.tags} == pytest.approx(TAG_SHARES, abs=0.03)


@pytest.mark.parametrize("split", ["validation", "held_out"])
def test_prompts_ask_for_each_requirement_equally_often(split) -> None:
    asked = data.prompts(split, 150, 0, 1 / 3, world=SCENES)
    times = Counter(splits.key_of(SCENES.parse(prompt)) for prompt in asked)
    unseen = [key for key, of in splits.held_out().items() if of == split]
    assert set(times) <= set(unseen)
    for tag in SCENES.tags:
        of_tag = [times[key] for key in unseen if key[0] == tag]
        assert max(of_tag) - min(of_tag) <= 1, tag
    assert data.prompts(split, 150, 1, 1 / 3, world=SCENES) != asked


def test_the_requirements_of_a_split_are_those_of_its_combinations() -> None:
    listed = [one for split in SPLITS for tag in SCENES.tags for one in SCENES.requirements_of(split, tag)]
    assert {splits.key_of(one): splits.split_of(one) for one in listed} == splits.held_out()
    with pytest.raises(ValueError, match="'places' is not a tag"):
        SCENES.requirements_of("validation", "places")


@pytest.mark.parametrize("prompt", ["a star left of a circle", "a red star and a circle", "a star and a circle"])
def test_a_size_or_a_color_may_be_left_open(prompt) -> None:
    assert splits.split_of(SCENES.parse(prompt)) == "train"


def test_captions_that_leave_out_are_true_and_say_no_number_size_or_place(rng) -> None:
    named, fewer = Counter(), 0
    for requirement in requirements(rng, "train", 300):
        words = captions.leave_out(requirement, rng).split()
        singular = [captions.singular(word) for word in words]
        shapes = [word for word in singular if word in splits.SHAPES]
        colors = [word for word in words if word in splits.COLORS]
        assert shapes and set(shapes) <= {group.shape for group in requirement.groups}
        assert set(colors) <= {group.color for group in requirement.groups}
        assert not {*captions.NUMBERS.values(), *splits.SIZES, "at", "middle", "left", "above"} & set(words)
        fewer += len(shapes) < len(requirement.groups)
        named[requirement.tag, bool(colors)] += 1
    assert fewer > 30
    assert named["color_attr", False] > named["color_attr", True] / 4


def test_careless_captions_are_mostly_wrong_and_every_word_of_any_caption_is_known(rng) -> None:
    known, wrong = set(SCENES.vocabulary()), 0
    for requirement in requirements(rng, "train", 400):
        for kind in SCENES.wordings.values():
            assert set(kind(requirement, rng).replace(",", " ,").split()) <= known
        try:
            wrong += SCENES.parse(captions.misdescribe(requirement, rng)) != requirement
        except UserError:
            wrong += 1
    assert 0.5 < wrong / 400 < 0.85


@pytest.mark.parametrize(
    ("prompt", "objects", "faults"),
    [
        ("three red stars", [("red", "star", 6, 6, 4), ("red", "star", 24, 24, 4)], ["too_few"]),
        ("two red stars", [("red", "star", x, y, 4) for x, y in ((6, 6), (24, 6), (16, 24))], ["too_many"]),
        ("two red stars", [("red", "star", 6, 6, 4), ("blue", "star", 24, 24, 4)], ["wrong_color"]),
        ("a large red star", [("blue", "star", 16, 16, 4)], ["wrong_color", "wrong_size"]),
        ("a small star and a circle", [("red", "star", 8, 8, 4), ("red", "moon", 24, 24, 4)], ["wrong_shape"]),
        ("a small star at the top left", [("red", "star", 25, 25, 4)], ["wrong_place"]),
        ("a star left of a ring", [("red", "star", 24, 16, 4), ("red", "ring", 8, 16, 4)], ["wrong_place"]),
        ("a large heart", [], ["too_few"]),
    ],
)
def test_each_fault_is_told_from_the_others(prompt, objects, faults) -> None:
    verdict = judged(prompt, *objects)
    assert not verdict.strict and verdict.reason
    assert list(verdict.faults) == faults


def test_something_unclean_is_a_fault_of_its_own() -> None:
    blob = [("red", "star", 8, 8, 4), ("blue", "circle", 22, 22, 5), ("blue", "square", 25, 25, 5)]
    assert list(judged("a small star", *blob).faults) == ["unclean"]


def test_sizes_and_places_count() -> None:
    star = ("red", "star", 6.5, 6.5, 4.0)
    assert judged("a small star at the top left", star).strict
    assert not judged("a large star at the top left", star).correct
    assert not judged("a small star in the middle", star).correct


def test_the_old_world_says_of_its_requirements_what_it_always_said() -> None:
    requirement = Requirement("position", (Group(1, "star", "red"), Group(1, "circle", "blue")), "left of")
    assert repr(requirement) == (
        "Requirement(tag='position', groups=(Group(count=1, shape='star', color='red'), "
        "Group(count=1, shape='circle', color='blue')), relation='left of')"
    )


def test_data_sets_have_the_captions_that_are_asked_for() -> None:
    sets = {kind: data.pairs("train", 12, 0, kind, SCENES)["caption"] for kind in ("plain", "careful", "coco", "mixed")}
    assert all("verified" in caption for caption in sets["careful"])
    assert not any("verified" in caption for caption in sets["plain"])
    assert len({tuple(column) for column in sets.values()}) == 4
    with pytest.raises(UserError, match="'web' is not a kind of captions"):
        data.pairs("train", 1, 0, "web", SCENES)
    rows = data.preferences("train", 3, 0, SCENES)
    for row in rows:
        asked = SCENES.parse(row["prompt"])
        assert SCENES.judge(row["chosen"], asked).strict and not SCENES.judge(row["rejected"], asked).strict
