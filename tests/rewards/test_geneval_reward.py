"""GenEval's rules as a reward: Flow-GRPO's score by hand, and the whole reward on a tiny detector."""

import json

import pytest
import torch
from agsm_rl_rewards.geneval.detector import detections
from agsm_rl_rewards.geneval.exact import exact
from agsm_rl_rewards.geneval.requirements import fault, object_names, requirements
from agsm_rl_rewards.geneval.reward import GenEvalReward
from agsm_rl_rewards.geneval.rules import Detection, judge
from agsm_rl_rewards.preprocessing import pictures
from tiny_detectors import save_tiny_clip, save_tiny_detector

from agsm_rl.errors import UserError
from agsm_rl.sources.prompt_lists import read_prompts


def seen(name, *, at=0, color=None, score=0.95):
    return Detection(name, score, (float(at), 0.0, at + 10.0, 10.0), color)


def asked(*include, tag="two_object"):
    return {"tag": tag, "include": [{"count": 1} | wanted for wanted in include]}


DOG, CAT = {"class": "dog"}, {"class": "cat"}
LEFT = {"class": "cat", "position": ["left of", 0]}


@pytest.mark.parametrize(
    ("objects", "include", "fraction", "correct"),
    [
        ([seen("dog")], [DOG], 1.0, True),
        ([], [DOG], 0.0, False),
        ([seen("dog"), seen("dog")], [DOG], 0.0, False),
        ([seen("dog")] * 3, [DOG], -1.0, False),
        ([seen("dog")] * 3, [DOG | {"count": 4}], 0.75, False),
        ([seen("dog")], [DOG, CAT], 0.5, False),
        ([seen("dog"), seen("cat"), seen("tv")], [DOG, CAT], 1.0, True),
        ([seen("dog", color="red")], [DOG | {"color": "red"}], 1.0, True),
        ([seen("dog", color="blue")], [DOG | {"color": "red"}], 0.5, False),
        ([], [DOG | {"color": "red"}], 0.0, False),
        ([seen("dog", color="red"), seen("dog", color="blue")], [DOG | {"count": 2, "color": "red"}], 0.75, False),
        ([seen("dog", at=100), seen("cat")], [DOG, LEFT], 1.0, True),
        # As published, a relation that does not hold adds a 0 and a 1.
        ([seen("dog"), seen("cat", at=100)], [DOG, LEFT], 0.75, False),
        ([seen("cat")], [DOG, LEFT], 1 / 3, False),
        ([seen("dog")], [DOG, LEFT], 1 / 3, False),
        # Of a wrong colour, the position is not looked at.
        ([seen("dog"), seen("cat", color="blue")], [DOG, LEFT | {"color": "red"}], 2 / 3, False),
    ],
)
def test_the_score_is_flow_grpos(objects, include, fraction, correct):
    verdict = exact(objects, asked(*include))
    assert verdict.fraction == pytest.approx(fraction)
    assert verdict.correct is correct


def test_more_objects_than_asked_for_are_correct_but_not_exact():
    objects = [seen("dog"), seen("dog")]
    assert judge(objects, asked(DOG)).correct and not exact(objects, asked(DOG)).correct


def test_counting_has_its_own_threshold():
    assert exact([seen("dog", score=0.5)], asked(DOG)).correct
    assert not exact([seen("dog", score=0.5)], asked(DOG, tag="counting")).correct


def test_requirements_are_read_from_every_form_of_table(tmp_path):
    row = asked(DOG | {"color": "red"}, LEFT) | {"prompt": "a red dog and a cat"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"exclude": None}))
    cell = json.dumps(row["include"]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'prompt,tag,include,exclude\na red dog and a cat,two_object,"{cell}",\n')
    for name in ("a.jsonl", "a.csv"):
        (prompt,) = read_prompts(str(tmp_path / name))
        assert requirements(prompt.metadata) == {"tag": row["tag"], "include": row["include"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tag": None}, "no `tag`"),
        ({"include": []}, "no `tag` or no `include`"),
        ({"include": "dog"}, "no `tag` or no `include`"),
        ({"include": [{"class": "dragon", "count": 1}]}, "one of COCO's 80"),
        ({"include": [{"class": ["dog"], "count": 1}]}, "one of COCO's 80"),
        ({"include": [{"class": "dog", "count": 0}]}, "and a count"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "'mauve' is not one of GenEval's colours"),
        ({"include": [DOG | {"count": 1}, LEFT | {"count": 1, "position": ["near", 0]}]}, "not a position"),
        ({"include": [DOG | {"count": 1}, LEFT | {"count": 1, "position": ["above", 1]}]}, "not a position"),
        ({"include": [DOG | {"count": 1}, LEFT | {"count": 1, "position": "above"}]}, "not a position"),
        ({"exclude": "dog"}, "must be a list"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(change, reason):
    row = asked(DOG) | change
    assert reason in fault(requirements(row), object_names())
    with pytest.raises(UserError, match="reward 'geneval': the prompt 'a dog' .*evaluation_metadata.jsonl"):
        GenEvalReward().check_prompts(["a dog"], [row])


def test_an_unknown_verdict_is_refused():
    with pytest.raises(UserError, match="verdict.*'exact' is not a verdict"):
        GenEvalReward(verdict="exact")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("geneval")
    return {
        "detector": str(save_tiny_detector(place / "detector")),
        "classifier": str(save_tiny_clip(place / "classifier")),
    }


def test_the_reward_judges_what_the_detector_finds(models):
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    fraction = GenEvalReward(**models)
    names = [row["class"] for row in fraction._models(pictures(images)[0]) if row["score"] > 0.3]
    name = names[0]
    rows = [
        asked({"class": name, "count": names.count(name)}),
        asked({"class": name, "count": names.count(name), "color": "red"}, {"class": "toaster"}),
    ]
    scores = fraction(images, ["one", "two"], rows)
    for picture, row, score in zip(pictures(images), rows, scores, strict=True):
        objects = detections(fraction._models(picture, {name}))
        assert score.item() == pytest.approx(exact(objects, row).fraction)
    assert scores[0] == 1
    assert GenEvalReward(verdict="strict", **models)(images[:1], ["one"], rows[:1]).tolist() == [1.0]
    assert GenEvalReward(verdict="correct", **models)(images[:1], ["one"], rows[:1]).tolist() == [1.0]


def test_missing_models_are_named_with_the_command_that_gets_them(tmp_path):
    reward = GenEvalReward(detector=str(tmp_path / "none"))
    with pytest.raises(UserError, match="reward 'geneval': detector '.*none': .*hf download"):
        reward(torch.zeros(1, 3, 32, 32), ["a dog"], [asked(DOG)])
