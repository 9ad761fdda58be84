"""The shapes world as data sets: deterministic, balanced, honest about what is held out, and in ordinary forms."""

from collections import Counter

import datasets
import numpy as np
import pytest

from agsm_rl.errors import UserError
from agsm_rl.shapes import data, world
from agsm_rl.shapes.judge import judge
from agsm_rl.shapes.worlds import SHAPES


def test_plain_and_careful_captions_describe_their_images() -> None:
    for captions in ("plain", "careful"):
        rows = data.pairs("train", 40, seed=1, captions=captions)
        assert rows.column_names == ["image", "caption"]
        assert all(judge(row["image"], world.parse(row["caption"])).strict for row in rows)
        assert all(("," in row["caption"]) == (captions == "careful") for row in rows)


def test_captions_change_no_image() -> None:
    plain, web = (data.pairs("train", 20, seed=1, captions=kind) for kind in ("plain", "web"))
    assert plain["caption"][:] != web["caption"][:]
    assert all(np.array_equal(a, b) for a, b in zip(plain["image"], web["image"], strict=True))


def test_rows_are_fixed_by_seed_and_number_alone() -> None:
    few, many, other = (data.pairs("train", num, seed=seed) for num, seed in ((5, 1), (10, 1), (5, 2)))
    assert few[:]["caption"] == many[:5]["caption"] != other[:]["caption"]
    assert np.array_equal(few[4]["image"], many[4]["image"])


def test_a_seed_gives_the_drawings_that_the_bases_were_trained_on() -> None:
    scene, caption = data._pair(SHAPES, "train", 0, 3, "plain")
    assert caption == "a drawing of a triangle and a star"
    assert [(item.shape, item.color) for item in scene.objects] == [("triangle", "purple"), ("star", "red")]
    placed = [(item.x, item.y, item.radius) for item in scene.objects]
    expected = [(23.317406306, 23.234046972, 5.953516737), (12.088501460, 11.683333071, 4.746560739)]
    np.testing.assert_allclose(placed, expected, rtol=0, atol=1e-8)


def test_splits_share_no_drawing() -> None:
    drawn = [{row["image"].tobytes() for row in data.pairs(split, 30, seed=1)} for split in ("train", "validation")]
    assert not drawn[0] & drawn[1]


def test_training_prompts_are_never_held_out_and_held_out_prompts_always_are() -> None:
    for split in ("train", "validation", "held_out"):
        asked = [world.parse(prompt) for prompt in data.prompts(split, 120, seed=0)]
        for requirement in asked:
            if requirement.tag != "single_object":
                assert world.is_held_out(requirement) == (split == "held_out")


def test_prompts_are_balanced_over_tags_in_every_stretch() -> None:
    tags = [world.parse(prompt).tag for prompt in data.prompts("train", 120, seed=0)]
    assert set(Counter(tags).values()) == {20}
    assert all(3 <= count <= 7 for count in Counter(tags[:30]).values())


def test_counting_gets_its_share_of_the_prompts() -> None:
    tags = Counter(world.parse(prompt).tag for prompt in data.prompts("held_out", 150, 0, counting_share=1 / 3))
    assert tags.pop("counting") == 50
    assert set(tags.values()) == {20}


def test_the_chosen_image_is_right_and_the_rejected_one_wrong() -> None:
    for split in ("train", "held_out"):
        rows = data.preferences(split, 30, seed=0)
        assert rows.column_names == ["prompt", "chosen", "rejected"]
        for row in rows:
            requirement = world.parse(row["prompt"])
            assert judge(row["chosen"], requirement).strict
            assert not judge(row["rejected"], requirement).correct


def test_no_rejected_training_image_shows_an_unseen_combination() -> None:
    for row in data.preferences("train", 60, seed=3):
        seen = Counter((item.color, item.shape) for item in judge(row["rejected"], world.parse("a star")).objects)
        assert not any(world.is_unseen_combination(count, *kind) for kind, count in seen.items())


def test_the_image_folder_is_read_by_datasets(tmp_path) -> None:
    data.write_image_folder(tmp_path / "new" / "shapes", "train", 6, seed=0)
    read = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "new" / "shapes"), split="train", cache_dir=str(tmp_path / "cache")
    )
    made = data.pairs("train", 6, seed=0)
    assert read["caption"][:] == made["caption"][:]
    assert all(np.array_equal(a, b) for a, b in zip(read["image"], made["image"], strict=True))
    assert set(read["tag"]) <= set(world.TAGS)


def test_nothing_is_written_into_a_directory_that_is_not_empty(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not an empty folder"):
        data.write_image_folder(tmp_path, "train", 1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unknown_split_or_kind_of_captions_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'held_out'"):
        data.prompts("heldout", 1, seed=0)
    with pytest.raises(UserError, match="Did you mean 'careful'"):
        data.pairs("train", 1, seed=0, captions="carefull")
