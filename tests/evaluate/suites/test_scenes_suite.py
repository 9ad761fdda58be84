"""The scenes suite: what is wrong with a picture is counted apart, and bases of other worlds are refused."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.suite import Judged
from agsm_rl.evaluate.suites.scenes import Scenes, ScenesResult
from agsm_rl.evaluate.suites.shapes import Shapes
from agsm_rl.registry import load
from agsm_rl.report.eval_rows import judged_of, scores_of
from agsm_rl.shapes.scenes_world.requirements import draw_scene
from agsm_rl.shapes.worlds import SCENES
from agsm_rl.sources.pairs import Pairs

SUITE = Scenes(split="validation", num_images=24)


def result(*, careless: bool) -> ScenesResult:
    """The suite's result of right drawings, or of what a careless eye takes each prompt for."""
    prompts = [str(row["prompt"]) for row in SUITE.prompts().values()]
    pictures = []
    for index, prompt in enumerate(prompts):
        asked = SCENES.parse(prompt)
        shown = SCENES.wrong_requirement(asked) if careless else asked
        pictures.append(SCENES.render(draw_scene(np.random.default_rng(index), shown, allow_unseen=True)))
    rows = SUITE.judge(pictures, prompts, [{"prompt": prompt} for prompt in prompts])
    judged = [Judged(i, 0, {"prompt": prompt}, row) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
    made = SUITE.result(judged)
    assert isinstance(made, ScenesResult)
    return made


def test_faults_are_figures_of_their_own_in_eval_json_tables_and_the_report():
    right, wrong = result(careless=False), result(careless=True)
    assert right.split == "validation" and right.scores()["strict"].value == 1
    assert wrong.scores()["overall"].value == 0 and wrong.scores()["too_few"].value > 0
    assert wrong.faults()["too_few"]["counting"].value > 0.4 and wrong.faults()["too_few"]["colors"].value == 0
    assert wrong.faults()["wrong_color"]["colors"].value == 1 == wrong.faults()["wrong_place"]["position"].value
    content = json.loads(json.dumps(wrong.to_json()))
    assert ScenesResult.from_json(content) == wrong
    assert content["faults"]["wrong_color"]["tags"]["colors"]["value"] == 1
    assert wrong.against(right)["difference"]["faults"]["wrong_place"]["value"] > 0
    assert judged_of(content).values["too_few"].sum() == sum(row["too_few"] for row in content["images"])
    assert scores_of(content)["too_many"].share
    console = Console(width=80, file=io.StringIO())
    wrong.show(console, right, labels=("right", "wrong"))
    text = console.file.getvalue()
    assert "too_many" in text and "scenes, strict" in text


def test_each_drawn_world_s_suite_refuses_the_other_s_bases_and_names_the_right_one():
    scenes, shapes = {"checkpoint": "builtin:scenes-sd3"}, {"checkpoint": "builtin:shapes-sd15"}
    SUITE.check_base(scenes)
    Shapes().check_base(shapes)
    with pytest.raises(UserError, match="Its own is the suite 'scenes'"):
        Shapes().check_base(scenes)
    with pytest.raises(UserError, match="Its own is the suite 'shapes'"):
        SUITE.check_base(shapes)


def test_the_reward_of_the_world_refuses_prompts_that_it_cannot_judge():
    reward = load("rewards", "scenes", where="")()
    reward.check_prompts(["a large red heart"], [{}])
    with pytest.raises(UserError, match="not a prompt of the scenes world"):
        reward.check_prompts(["a red star left of a blue circle"], [{}])


@pytest.mark.parametrize(
    ("dataset", "captions", "message"),
    [("builtin:scenes", "web", "'web' is not a kind of captions"), ("photos", "coco", "has captions of its own")],
)
def test_captions_that_a_data_set_cannot_have_are_refused(dataset, captions, message):
    with pytest.raises(UserError, match=message):
        Pairs(dataset, captions=captions)
    assert Pairs("builtin:scenes", captions="coco").captions == "coco"
