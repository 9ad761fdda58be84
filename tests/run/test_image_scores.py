"""How scores changed between two evaluations: paired, over requirements, from what each image was worth."""

import numpy as np
import pytest
from scipy import stats

from agsm_rl.evaluate.measured import entries_of, from_rows
from agsm_rl.evaluate.suite import Judged
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.image_scores import ImageScoresFile, changes, image_scores

COLORS = ("red", "green", "blue", "purple")
ALONE = [f"{start}a {color} star" for color in COLORS for start in ("", "a photo of ")]
"""Four requirements of one tag, each in two wordings."""


def entry_of(**evaluate):
    content = {
        "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
        "adapters": {"lora": {"use": "lora"}},
        "objectives": [
            {"use": "score_matching", "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2}}
        ],
        "evaluate": evaluate,
    }
    recipe = Recipe.from_data({"steps": 1} | content)
    (entry,) = entries_of(recipe.evaluate, recipe.parts)
    return entry


@pytest.fixture(scope="module")
def of_shapes():
    """An evaluation by the shapes judge, with a reward beside it."""
    entry = entry_of(suite="shapes", num_images=8, rewards=["sharpness"])

    def measured(strict, *, lenient=None, sharp=None, prompts=ALONE):
        verdicts, scores = [], []
        for place, prompt in enumerate(prompts):
            row = {"prompt": prompt, "tag": "colors", "reason": "", "strict": bool(strict[place])}
            row["correct"] = bool((lenient or strict)[place])
            verdicts.append(Judged(place, 0, {"prompt": prompt}, row))
            scores.append(Judged(place, 0, {"prompt": prompt}, {"sharpness": (sharp or [0.5] * 8)[place]}))
        return from_rows(entry, 2.0, [verdicts, scores], {})

    return measured


NAMES = ("overall", "strict", "reward/sharpness")


def scores_of(measured):
    return image_scores(measured, measured.figures())


def change_of(before, after):
    return changes(after, scores_of(before), scores_of(after))


def test_two_wordings_of_a_requirement_count_as_one(of_shapes):
    after = [1, 1, 1, 1, 0, 0, 1, 1]
    found = change_of(of_shapes([0] * 8), of_shapes(after))["strict"]
    by_requirement = np.mean(np.reshape(after, (4, 2)), axis=1)
    low, high = stats.t.interval(0.95, 3, 0.75, stats.sem(by_requirement))
    assert (found.value, found.low, found.high) == pytest.approx((0.75, low, min(high, 1.0)))
    assert not found.excludes_zero


def test_the_interval_is_of_the_paired_difference(of_shapes):
    before, after = [0.1, 0.2, 0.9, 0.8, 3.1, 3.2, 7.0, 7.1], [0.2, 0.3, 1.0, 0.9, 3.2, 3.3, 7.1, 7.4]
    found = change_of(of_shapes([1] * 8, sharp=before), of_shapes([1] * 8, sharp=after))["reward/sharpness"]
    # Requirements differ a thousand times more than any of them changed.
    assert found.value == pytest.approx(0.125) and found.excludes_zero and found.high < 0.3


def test_the_scores_have_the_names_of_evaluations_jsonl_and_change_as_they_do(of_shapes):
    twice = [*ALONE[:6], ALONE[0], ALONE[0]]
    before = of_shapes([0, 0, 1, 0, 0, 1, 0, 0], sharp=[1.0, 2, 3, 4, 5, 6, 7, 8], prompts=twice)
    after = of_shapes(
        [1, 0, 1, 0, 0, 1, 0, 0], lenient=[1, 1, 1, 1, 0, 1, 0, 0], sharp=[2.0, 2, 3, 5, 5, 6, 7, 9], prompts=twice
    )
    found, first, last = change_of(before, after), before.figures(), after.figures()
    assert set(found) == {"overall", "strict", "reward/sharpness"} == set(last)
    assert {name: part.value for name, part in found.items()} == pytest.approx(
        {name: last[name] - first[name] for name in last}
    )


def test_several_images_of_a_prompt_are_averaged_first():
    entry = entry_of(suites={"mine": {"use": "rewards", "prompts": "builtin:shapes-prompts", "rewards": ["sharpness"]}})
    prompts, pair = [f"number {place}" for place in range(6)], {}
    for side, gains in (("before", [0.0] * 6), ("after", [1.0, 1.2, 0.9, 1.1, 1.3, 0.7])):
        rows = [
            Judged(place, number, {"prompt": prompt}, {"sharpness": place + gains[place] * (1 + (number or -1) * 0.5)})
            for place, prompt in enumerate(prompts)
            for number in range(2)
        ]
        pair[side] = from_rows(entry, 1.0, [rows], {})
    found = change_of(pair["before"], pair["after"])["reward/sharpness"]
    gains = np.array([1.0, 1.2, 0.9, 1.1, 1.3, 0.7])
    low, high = stats.t.interval(0.95, 5, gains.mean(), stats.sem(gains))
    assert (found.value, found.low, found.high) == pytest.approx((gains.mean(), low, high))


@pytest.mark.filterwarnings("ignore:The BCa confidence interval")  # of the reward that is not finite
def test_what_is_not_known_of_all_images_at_both_ends_has_no_interval(of_shapes):
    whole = of_shapes([1, 0] * 4)
    scores = scores_of(whole)
    assert changes(whole, {}, scores) == {}
    shorter = {name: values[:5] for name, values in scores.items()}
    assert changes(whole, shorter | {"strict": scores["strict"]}, scores).keys() == {"strict"}
    assert "reward/sharpness" not in scores_of(of_shapes([1] * 8, sharp=[float("nan"), *[0.5] * 7]))


def test_rows_of_another_form_are_passed_over(of_shapes, monkeypatch):
    measured = of_shapes([1] * 8)
    content, scores = measured.to_json(), scores_of(measured)
    for rows in ([{"prompt": "a star", "strict": "yes"}], [{"prompt": "a star", "scores": [0.5]}], [{"strict": True}]):
        monkeypatch.setattr(type(measured), "to_json", lambda self, rows=rows: content | {"images": rows})
        assert changes(measured, scores, scores) == {}
        assert scores_of(measured) == {} or "prompt" not in rows[0]


def test_the_file_holds_what_was_measured_suite_by_suite(of_shapes, tmp_path):
    file, measured = ImageScoresFile(tmp_path / "image_scores.jsonl", kept=True), of_shapes([1, 0] * 4)
    file.add(2, measured, NAMES)
    file.add(4, of_shapes([1] * 8), NAMES)
    assert file.of("shapes") == {2: scores_of(measured), 4: scores_of(of_shapes([1] * 8))}
    assert file.of("mine") == {}
    file.cut(3)
    assert list(file.of("shapes")) == [2]


def test_a_run_that_needs_no_image_scores_writes_none(of_shapes, tmp_path):
    file = ImageScoresFile(tmp_path / "image_scores.jsonl", kept=False)
    file.add(2, of_shapes([1] * 8), NAMES)
    file.cut(1)
    assert file.of("shapes") == {} and not file.path.exists()
