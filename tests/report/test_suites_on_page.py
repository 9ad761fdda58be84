"""Any suite is shown: rewards by means and paired differences, others as they are; what is not understood is named."""

import json

import numpy as np
import pytest
from making_runs import by_rewards, evaluation, rewards_entry, with_suites, write_run
from PIL import Image
from reading_pages import page
from statsmodels.stats.weightstats import DescrStatsW
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.report.load import load

SHAPES = evaluation([f"a drawing of number {number}" for number in range(24)], {1.0: (0.3, 0.5)}, 0)


def of_prompts(entry: dict, reward: str) -> np.ndarray:
    """The mean over each prompt's images."""
    return np.array([np.mean(row["scores"][reward]) for row in entry["images"]])


def over_prompts(values: np.ndarray) -> list[float]:
    """The mean with Student's interval."""
    return [values.mean(), *DescrStatsW(values).tconfint_mean()]


def the(found: list[dict], **how) -> dict:
    (one,) = [one for one in found if all(one[key] == value for key, value in how.items())]
    return one


def test_a_rewards_suite_is_compared_by_means_over_prompts_with_students_interval(tmp_path):
    entry = by_rewards()
    found = page(with_suites(write_run(tmp_path / "mine"), {"own": [entry]}))
    assert found.suite["name"] == "own (rewards)" and found.suite["tags"] == {}
    assert found.suite["scores"]["sharpness"] == {"label": "sharpness", "share": False}
    for reward in ("sharpness", "brightness"):
        after, before = of_prompts(entry, reward), of_prompts(entry["base"], reward)
        reached = the(found.suite["estimates"], score=reward, base=False)
        assert reached["overall"] == pytest.approx(over_prompts(after), rel=1e-4)
        change = the(found.suite["differences"], score=reward, base=True)
        assert change["overall"] == pytest.approx(over_prompts(after - before), rel=1e-4, abs=1e-6)
    assert "On 12 prompts, at guidance 1 mine raises mean sharpness from" in found.text
    assert "24 images of 12 prompts" in found.text


def test_over_several_seeds_a_reward_is_the_mean_of_the_seeds(tmp_path):
    entries = [by_rewards(seed) for seed in range(3)]
    runs = [
        with_suites(write_run(tmp_path / f"mine-seed{seed}", seed=seed), {"own": [entry]})
        for seed, entry in enumerate(entries)
    ]
    change = the(page(*runs).suite["differences"], score="sharpness", base=True)
    by_seed = [(of_prompts(one, "sharpness") - of_prompts(one["base"], "sharpness")).mean() for one in entries]
    assert change["by_seed"] == pytest.approx(by_seed, abs=1e-5)
    value, low, high = change["overall"]
    assert value == pytest.approx(np.mean(by_seed), abs=1e-5) and 0 < low < value < high < 0.4


def test_every_suite_of_a_recipe_is_there_and_one_table_has_every_score(tmp_path):
    run = with_suites(write_run(tmp_path / "mine"), {"world": [SHAPES], "own": [by_rewards()]})
    found = page(run)
    assert [one["name"] for one in found.data["suites"]] == ["world (shapes)", "own (rewards)"]
    assert "world exactly right (strict) 1" in found.text and "own sharpness 1" in found.text
    assert "own brightness 1" in found.text


def test_runs_of_different_suites_are_compared_where_they_share_one(tmp_path):
    one = with_suites(write_run(tmp_path / "one"), {"world": [SHAPES], "own": [by_rewards()]})
    other = with_suites(write_run(tmp_path / "other", rank=4), {"own": [by_rewards(1)]})
    found = page(one, other)
    assert list(found.data["suites"][0]["views"][0]["guidance"]["variants"]) == ["one"]
    assert list(found.data["suites"][1]["views"][0]["guidance"]["variants"]) == ["one", "other"]
    assert "other: not measured on the suite world." in found.text


def test_a_suite_of_the_same_name_on_other_prompts_is_refused(tmp_path):
    one = with_suites(write_run(tmp_path / "one"), {"own": [by_rewards()]})
    other = with_suites(write_run(tmp_path / "other", rank=4), {"own": [by_rewards(prompts=9)]})
    with pytest.raises(UserError, match="different numbers of images"):
        load([one, other])


def eval_file(place, content: dict, **how):
    """What `agsm-rl eval --json` writes."""
    told = {"target": "runs/mine", "seed": 0, "num_steps": 20, "prompt_suffix": "", "drawing": None}
    place.write_text(json.dumps(content | told | how))
    return place


def test_a_file_of_eval_is_reported_with_its_base_and_without_curves(tmp_path):
    file = eval_file(tmp_path / "rewards.json", by_rewards())
    done = CliRunner().invoke(app, ["report", str(file)])
    assert done.exit_code == 0 and done.output.strip() == str(tmp_path / "rewards.html")
    found = page(file)
    assert [one["name"] for one in found.data["variants"]] == ["rewards"]
    assert found.data["runs"][0]["curves"]["step"] == []
    change = the(found.suite["differences"], score="sharpness", base=True)
    assert change["overall"][0] > 0.1
    pairs = zip(by_rewards()["images"], by_rewards()["base"]["images"], strict=True)
    wins = np.mean([np.greater(one["scores"]["sharpness"], other["scores"]["sharpness"]) for one, other in pairs])
    assert change["wins"][0] == pytest.approx(wins)


def test_metrics_beside_a_file_of_eval_are_not_taken_for_its_own(tmp_path):
    run = write_run(tmp_path / "mine")
    found = page(eval_file(run / "rewards.json", by_rewards()))
    assert found.data["runs"][0]["curves"]["metrics"] == found.data["runs"][0]["rewards"] == {}


def test_without_the_base_it_says_what_was_reached(tmp_path):
    entry = by_rewards()
    del entry["base"]
    found = page(eval_file(tmp_path / "a.json", entry))
    assert found.suite["differences"] == [] and found.suite["views"][0]["guidance"]["base"] is None
    assert "The base was not measured beside it." in found.text
    reached = of_prompts(entry, "sharpness").mean()
    assert the(found.suite["estimates"], score="sharpness")["overall"][0] == pytest.approx(reached, abs=1e-5)


def test_another_model_measured_beside_it_is_a_variant_of_its_own(tmp_path):
    entry = by_rewards()
    other = entry.pop("base") | {"target": "runs/theirs", "drawing": None}
    found = page(eval_file(tmp_path / "a.json", entry, other=other))
    assert [one["name"] for one in found.data["variants"]] == ["a", "theirs"]
    change = the(found.suite["differences"], score="sharpness")
    assert (change["model"], change["minus"]) == ("a", "theirs") and change["overall"][0] > 0.1


def test_images_that_another_tool_drew_have_no_guidance(tmp_path):
    found = page(eval_file(tmp_path / "a.json", by_rewards() | {"guidance": None}, seed=None, num_steps=None))
    assert "the guidance that they were drawn with" in found.text


def test_a_suite_that_is_not_known_is_shown_by_its_figures(tmp_path):
    entry = {"suite": "fid", "num_images": 8, "guidance": 1.0, "overall": 41.5, "tags": {}, "network": "inception"}
    entry |= {
        "base": dict(entry, overall=50.25),
        "difference": {"overall": {"value": -8.75, "low": None, "high": None}},
    }
    found = page(with_suites(write_run(tmp_path / "mine"), {"distance": [entry]}))
    assert "distance overall 1 50.25 41.5 −8.75" in found.text
    both = page(with_suites(write_run(tmp_path / "two"), {"own": [by_rewards()], "distance": [entry]}))
    assert "distance overall 1 50.25 41.5 −8.75" in both.text and len(both.data["suites"]) == 1


def test_a_suite_of_a_plug_in_is_paired_if_its_rows_have_scores(tmp_path):
    rows = [{"prompt": f"{number}", "scores": {"depth": number / 10}} for number in range(8)]
    better = [row | {"scores": {"depth": row["scores"]["depth"] + 0.5}} for row in rows]
    entry = {"suite": "theirs", "guidance": 1.0, "overall": 0.85, "images": better}
    entry |= {"base": {"suite": "theirs", "overall": 0.35, "images": rows}}
    found = page(with_suites(write_run(tmp_path / "mine"), {"depth": [entry]}))
    assert the(found.suite["differences"], score="depth")["overall"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("images", [[3], [{"no": "prompt"}], {"a": 1}, "text"])
def test_rows_of_an_unknown_form_leave_the_figures(tmp_path, images):
    entry = {"suite": "theirs", "guidance": 1.0, "overall": 0.75, "images": images}
    found = page(with_suites(write_run(tmp_path / "mine"), {"depth": [entry]}))
    assert "depth overall 1 – 0.75" in found.text and found.data["suites"] == []


def test_what_is_not_understood_is_named_and_the_rest_is_shown(tmp_path):
    run = with_suites(
        write_run(tmp_path / "mine"), {"own": [by_rewards()], "odd": [{"suite": "odd", "verdict": "fine"}]}
    )
    found = page(run)
    assert "the suite 'odd' is not understood" in found.text and len(found.data["suites"]) == 1
    alone = page(with_suites(write_run(tmp_path / "two"), {"odd": [{"suite": "odd", "verdict": "fine"}]}))
    assert "the suite 'odd' is not understood" in alone.text and alone.data["runs"][0]["curves"]["step"]


def test_a_reward_that_lacks_figures_is_left_out_by_name(tmp_path):
    entry = by_rewards()
    entry["images"][3]["scores"]["brightness"][1] = float("nan")
    found = page(with_suites(write_run(tmp_path / "mine"), {"own": [entry]}))
    assert list(found.suite["scores"]) == ["sharpness"]
    assert "brightness is left out: not every image has a finite figure" in found.text


def test_rewards_beside_a_verdict_are_scores_too(tmp_path):
    entry = json.loads(json.dumps(SHAPES))
    for part, add in ((entry, 0.25), (entry["base"], 0.0)):
        for number, row in enumerate(part["images"]):
            row["rewards"] = {"sharpness": number / 24 + add}
    found = page(with_suites(write_run(tmp_path / "mine"), {"world": [entry]}))
    assert list(found.suite["scores"]) == ["strict", "correct", "sharpness"]
    assert the(found.suite["differences"], score="sharpness")["overall"] == pytest.approx([0.25, 0.25, 0.25])


def test_mean_rewards_without_their_images_are_figures(tmp_path):
    found = page(write_run(tmp_path / "mine", scores={1.0: (0.3, 0.5)}))
    assert "shapes shapes 1 0.3 0.5 +0.2" in found.text


@pytest.mark.parametrize("harm", [{"scores": 3}, {"scores": {"sharpness": ["high"]}}, {"prompt": None, "scores": {}}])
def test_a_damaged_rewards_file_is_refused_by_name(tmp_path, harm):
    entry = by_rewards()
    entry["images"][0] |= harm
    run = with_suites(write_run(tmp_path / "mine"), {"own": [entry]})
    with pytest.raises(UserError, match="mine/eval.json: .*evaluate the run again"):
        load([run])


def test_the_largest_gains_and_losses_are_among_the_pictures_where_they_were_kept(tmp_path):
    base = np.full((40, 1), 0.5)
    trained = base.copy()
    trained[30], trained[31], trained[35] = 0.9, 0.1, 1.0
    entry = rewards_entry({"sharpness": trained}) | {"base": rewards_entry({"sharpness": base})}
    run = with_suites(write_run(tmp_path / "mine", images=20), {"own": [entry]})
    for side in ("base", "trained"):
        for number in (30, 31):  # the run did not keep number 35
            Image.new("RGB", (8, 8)).save(run / "samples" / "eval" / "guidance-1" / side / f"{number:04d}.png")
    found = page(run).suite["pictures"]
    asked = {row["prompt"]: row["first"] for row in found["prompts"]}
    assert asked["a photo of 30"] is False and asked["a photo of 31"] is False and "a photo of 35" not in asked
    assert (found["kept"], found["total"], sum(asked.values())) == (22, 40, 16)
    place = list(asked).index("a photo of 30")
    assert found["shown"]["1"]["variants"]["mine"][place]["sharpness"] == 0.9


def test_a_further_suite_s_pictures_are_those_in_its_own_folder(tmp_path):
    run = with_suites(write_run(tmp_path / "mine"), {"world": [SHAPES], "own": [by_rewards(images=1)]})
    place = run / "samples" / "eval" / "own" / "guidance-1" / "base"
    place.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(place / "0000.png")
    world, own = (one["pictures"] for one in page(run).data["suites"])
    assert len(world["images"]) == 4 and len(own["images"]) == 1
