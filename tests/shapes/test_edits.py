"""Edits of the shapes world: what should change and what should stay are judged apart, and exactly."""

from dataclasses import replace

import numpy as np
import pytest

from agsm_rl.shapes import world
from agsm_rl.shapes.edits import ShapeEdit, draw_edits, judge_edit


@pytest.fixture(scope="module", params=["validation", "held_out"])
def edits(request):
    return draw_edits(request.param, 24, 0)


def edited(edit):
    """The objects as the edit asks for them."""
    first = world.parse(edit.target).groups[0]
    changed = [replace(item, color=first.color, shape=first.shape) for item in edit.objects[: edit.changing]]
    return (*changed, *edit.objects[edit.changing :])


def test_the_edited_drawing_is_right_and_the_source_has_kept_only(edits):
    for edit in edits:
        done, source = judge_edit(world.render(edited(edit)), edit), judge_edit(world.render(edit.objects), edit)
        assert (done.changed, done.kept, done.reason) == (True, True, ""), edit
        assert (source.changed, source.kept) == (False, True), edit
        assert source.reason


def test_another_drawing_of_the_target_has_changed_only(edits):
    rng = np.random.default_rng(1)
    for edit in edits:
        scene = world.draw_scene(rng, world.parse(edit.target), allow_unseen=True)
        assert judge_edit(world.render(scene), edit).changed
    several = [edit for edit in edits if len(edit.objects) > 2]
    scenes = [world.draw_scene(rng, world.parse(edit.target), allow_unseen=True) for edit in several]
    assert not any(judge_edit(world.render(scene), edit).kept for scene, edit in zip(scenes, several, strict=True))


def test_an_object_that_should_stay_and_does_not_is_named():
    objects = (world.DrawnObject("circle", "red", 8, 8, 5), world.DrawnObject("star", "blue", 23, 23, 5.5))
    edit = ShapeEdit("color", "a red circle and a blue star", "a green circle and a blue star", objects, 1)
    green = replace(objects[0], color="green")
    assert judge_edit(world.render((green, objects[1])), edit).kept
    moved = judge_edit(world.render((green, replace(objects[1], x=8))), edit)
    assert (moved.changed, moved.kept) == (True, False) and "the blue star is gone" in moved.reason
    other = judge_edit(world.render((replace(green, shape="square"), objects[1])), edit)
    assert not other.changed and not other.kept and "the red circle became a green square" in other.reason
    extra = judge_edit(world.render((green, objects[1], world.DrawnObject("square", "red", 24, 7, 4.5))), edit)
    assert (extra.changed, extra.kept) == (True, False) and "an extra red square" in extra.reason


def test_both_kinds_come_in_turn_with_prompts_that_differ_in_what_changes(edits):
    assert [edit.kind for edit in edits[:4]] == ["color", "shape", "color", "shape"]
    for edit in edits:
        before, after = (world.parse(text).groups for text in (edit.source, edit.target))
        assert before[1:] == after[1:] and before[0].count == after[0].count == edit.changing
        assert (before[0].color != after[0].color) is (edit.kind == "color")
        assert (before[0].shape != after[0].shape) is (edit.kind == "shape")


def test_an_edit_is_plain_data_and_the_same_for_any_number(edits):
    for edit in edits:
        assert ShapeEdit.from_json(edit.to_json(), edit.target) == edit
    assert draw_edits("train", 3, 5) == draw_edits("train", 9, 5)[:3] != draw_edits("train", 3, 6)
