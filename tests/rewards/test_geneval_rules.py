"""GenEval's rules against cases computed by hand, with detections injected."""

import numpy as np
import pytest
from agsm_rl_rewards.geneval.rules import Detection, Rules, color_crop, confident, judge, overlap, relations
from PIL import Image


def seen(name, score=0.8, box=(0, 0, 10, 10), color=None):
    return Detection(name, score, tuple(map(float, box)), color)


def asked(tag="single_object", exclude=(), **wanted):
    return {"tag": tag, "include": [{"class": "dog", "count": 1} | wanted], "exclude": list(exclude)}


@pytest.mark.parametrize(
    ("tag", "score", "counts"),
    [
        ("single_object", 0.3, False),
        ("single_object", 0.3001, True),
        ("colors", 0.31, True),
        ("counting", 0.9, False),
        ("counting", 0.9001, True),
        ("counting", 0.5, False),
    ],
)
def test_a_detection_counts_above_the_threshold_of_its_tag_and_not_at_it(tag, score, counts):
    verdict = judge([seen("dog", score)], asked(tag))
    assert verdict.correct is counts
    assert verdict.reason == ("" if counts else "expected dog>=1, found 0")


def test_at_most_sixteen_of_a_class_are_kept_and_they_are_the_most_confident():
    scores = [0.31 + 0.01 * k for k in range(20)]
    kept = confident([seen("dog", score) for score in scores] + [seen("cat", 0.4)], "single_object")
    assert [item.score for item in kept["dog"]] == sorted(scores, reverse=True)[:16]
    assert len(kept["cat"]) == 1
    many = asked("counting", count=16, exclude=[{"class": "dog", "count": 17}])
    assert judge([seen("dog", 0.95)] * 20, many).correct, "a seventeenth is never seen"


def test_boxes_on_top_of_each_other_are_both_kept_by_default():
    twins = [seen("dog", 0.9, (0, 0, 10, 10)), seen("dog", 0.8, (0, 0, 10, 10))]
    assert len(confident(twins, "single_object")["dog"]) == 2
    assert judge(twins, asked(count=2)).correct


def test_a_lower_limit_of_overlap_removes_the_less_confident_of_two_at_or_above_it():
    # With a pixel added to each side: 10 x 10 of 10 x 10 + 10 x 10 - 50, a third.
    a, b = (0, 0, 9, 9), (5, 0, 14, 9)
    assert overlap(a, b) == pytest.approx(50 / 150)
    pair = [seen("dog", 0.8, b), seen("dog", 0.9, a)]
    assert [item.score for item in confident(pair, "x", Rules(max_overlap=1 / 3))["dog"]] == [0.9]
    assert len(confident(pair, "x", Rules(max_overlap=0.34))["dog"]) == 2


def test_a_removed_detection_removes_no_other():
    # b overlaps a and c, a and c do not overlap: without b, c stays.
    row = [seen("dog", 0.9, (0, 0, 9, 9)), seen("dog", 0.8, (6, 0, 15, 9)), seen("dog", 0.7, (12, 0, 21, 9))]
    assert [item.score for item in confident(row, "x", Rules(max_overlap=0.2))["dog"]] == [0.9, 0.7]


def test_boxes_apart_do_not_overlap_and_one_of_no_size_is_no_error():
    assert overlap((0, 0, 4, 4), (20, 20, 24, 24)) == 0
    assert overlap((5, 5, 3, 3), (5, 5, 3, 3)) == 0


def test_too_few_is_told_with_the_number():
    assert judge([seen("dog"), seen("cat")], asked(count=2)).reason == "expected dog>=2, found 1"


@pytest.mark.parametrize(("number", "correct"), [(1, False), (2, True), (3, False), (4, False)])
def test_counting_wants_the_number_and_no_more(number, correct):
    two = asked("counting", count=2, exclude=[{"class": "dog", "count": 3}])
    verdict = judge([seen("dog", 0.95)] * number, two)
    assert verdict.correct is correct
    if number > 2:
        assert verdict.reason == f"expected dog<3, found {number}"


def test_every_include_must_be_there_and_any_exclude_spoils_it():
    both = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
    assert judge([seen("cat"), seen("dog")], both).correct
    assert judge([], both).reason == "expected dog>=1, found 0\nexpected cat>=1, found 0"
    assert not judge([seen("cat"), seen("dog")], both | {"exclude": [{"class": "cat", "count": 1}]}).correct


def test_of_several_the_most_confident_decides_the_color():
    red = asked("colors", color="red")
    assert judge([seen("dog", 0.5, color="blue"), seen("dog", 0.9, color="red")], red).correct
    wrong = judge([seen("dog", 0.9, color="blue"), seen("dog", 0.5, color="red")], red)
    assert wrong.reason == "expected red dog>=1, found 0 red; and 1 blue"


def test_each_of_several_must_have_the_color():
    red = asked("colors", count=2, color="red")
    assert not judge([seen("dog", color="red"), seen("dog", color="white")], red).correct
    assert judge([seen("dog", color="red")] * 2 + [seen("dog", 0.4, color="white")], red).correct


def test_a_color_that_was_not_classified_is_an_error_and_not_a_wrong_image():
    with pytest.raises(ValueError, match="not classified"):
        judge([seen("dog")], asked("colors", color="red"))


# Boxes of 10 x 10 around (50, 50) and where the other one stands. Each axis is shrunk by 0.1 * (10 + 10) = 2.
@pytest.mark.parametrize(
    ("dx", "dy", "held"),
    [
        (20, 0, {"right of"}),  # 18 / 20
        (-20, 0, {"left of"}),
        (0, 20, {"below"}),
        (0, -20, {"above"}),
        (20, 20, {"right of", "below"}),  # 18 / 28.3 = 0.64 each
        (-20, -20, {"left of", "above"}),
        (20, 10, {"right of"}),  # 18 / 22.4 = 0.80 and 8 / 22.4 = 0.36
        (4, 0, set()),  # (4 - 2) / 4 is exactly 0.5, which is not beyond it
        (-4, 0, set()),
        (0, 4, set()),
        (5, 0, {"right of"}),  # 3 / 5
        (2, 0, set()),  # nothing is left of it
        (2, 2, set()),
        (1, -1, set()),
        (0, 0, set()),  # coincident centres
    ],
)
def test_where_a_box_lies_relative_to_another(dx, dy, held):
    a, b = (45 + dx, 45 + dy, 55 + dx, 55 + dy), (45, 45, 55, 55)
    assert relations(a, b) == held


def test_large_boxes_need_a_large_offset():
    # Shrunk by 0.1 * (100 + 20) = 12: (20 - 12) / 20 is 0.4.
    assert relations((-50 + 20, 0, 50 + 20, 10), (-10, 0, 10, 10)) == frozenset()
    assert relations((-50 + 25, 0, 50 + 25, 10), (-10, 0, 10, 10)) == {"right of"}


def test_the_margin_is_of_each_axis_own_sizes():
    # Wide and flat boxes: 0.1 * (80 + 80) = 16 across, 0.1 * (4 + 4) = 0.8 down.
    assert relations((20, 20, 100, 24), (0, 0, 80, 4)) == {"below"}


def place(relation, first, second, count=1):
    wanted = {"class": "cat", "count": count, "position": [relation, 0]}
    return {"tag": "position", "include": [{"class": "dog", "count": 1} | first, wanted | second]}


def test_position_is_of_the_later_object_relative_to_the_earlier_one():
    objects = [seen("dog", box=(0, 0, 10, 10)), seen("cat", box=(50, 0, 60, 10))]
    assert judge(objects, place("right of", {}, {})).correct
    verdict = judge(objects, place("above", {}, {}))
    assert verdict.reason == "expected cat above target, found right of target"


def test_the_most_confident_pair_decides_the_position():
    objects = [seen("dog", box=(0, 0, 10, 10)), seen("cat", 0.9, (50, 0, 60, 10)), seen("cat", 0.5, (-50, 0, -40, 10))]
    assert judge(objects, place("right of", {}, {})).correct
    assert not judge(objects, place("left of", {}, {})).correct
    assert not judge(objects, place("right of", {}, {}, count=2)).correct, "both cats must lie there"


def test_without_its_target_a_position_is_wrong():
    assert judge([seen("cat")], place("above", {}, {})).reason == (
        "expected dog>=1, found 0\nno target for cat to be above"
    )
    wrong_color = [seen("dog", color="red", box=(0, 50, 10, 60)), seen("cat")]
    assert "no target for cat" in judge(wrong_color, place("above", {"color": "blue"}, {})).reason


def test_a_wrong_color_is_told_and_the_position_then_is_not():
    objects = [seen("dog", box=(0, 50, 10, 60)), seen("cat", color="red")]
    assert judge(objects, place("below", {}, {"color": "blue"})).reason == (
        "expected blue cat>=1, found 0 blue; and 1 red"
    )


def test_the_color_crop_is_the_box_with_999999_outside_the_mask():
    picture = Image.new("RGB", (8, 6), (255, 0, 0))
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:5] = True
    crop = np.array(color_crop(picture, (2.0, 1.0, 6.0, 5.0), mask))
    expected = np.full((4, 4, 3), 0x99, dtype=np.uint8)
    expected[1:3, 1:3] = (255, 0, 0)
    assert np.array_equal(crop, expected)


def test_without_a_mask_the_crop_is_the_box_as_it_is():
    picture = Image.new("RGB", (8, 6), (255, 0, 0))
    assert np.array_equal(np.array(color_crop(picture, (2.4, 1.0, 5.6, 5.0), None)), np.full((4, 4, 3), (255, 0, 0)))


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="mask"):
        color_crop(Image.new("RGB", (8, 6)), (0.0, 0.0, 1.0, 1.0), np.ones((8, 6), dtype=bool))
