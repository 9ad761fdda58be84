"""A run's metrics and evaluations as curves; what cannot be shown leaves the page whole."""

import json
import re

import pytest
import yaml
from making_runs import write_run
from reading_pages import entries, page, share

from agsm_rl.report.page import write_report


def test_curves_have_steps_seconds_and_images_so_far(tmp_path):
    run = write_run(tmp_path / "mine", steps=40)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # a line torn by a kill
    (found,) = page(run).data["runs"]
    curves = found["curves"]
    assert curves["step"] == list(range(1, 41))
    assert curves["seconds"][-1] == 20 and curves["images"][-1] == 64 * 20
    assert curves["metrics"]["ddpo/reward"][9] == pytest.approx(0.5)
    assert found["rewards"]["shapes"] == pytest.approx([0.425, 0.785])  # first and last four steps
    assert [(row["step"], round(row["strict"], 6)) for row in found["evaluations"]["shapes"]] == [
        (0, round(share(entries(run)[1.0]["base"]), 5)),
        (20, 0.45),
        (40, round(share(entries(run)[1.0]), 5)),
    ]


def test_a_reward_that_is_only_watched_is_not_called_trained(tmp_path):
    run = write_run(tmp_path / "mine")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"ddpo/reward/watched": 1.0, "ddpo/reward/half": 1.0} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    rewards = {"shapes": 1.0, "watched": {"weight": 0.0}, "half": {"weight": 0.5}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"sources": {"own": {"rewards": rewards}}}))
    assert list(page(run).data["runs"][0]["rewards"]) == ["shapes", "half"]


ODD_FIGURES = [float("nan"), float("inf"), 1e308, 10**400, True, "text", None, [1]]


def test_figures_that_cannot_be_shown_leave_the_page_whole(tmp_path):
    run = write_run(tmp_path / "mine", scores={1.0: (0.3, 0.5)})
    content = json.loads((run / "eval.json").read_text())
    content["rewards"] = {"a": float("nan"), "b": 0.5}
    content["base"]["rewards"] = {"a": 0.0, "b": float("inf")}
    (run / "eval.json").write_text(json.dumps(content))
    with (run / "metrics.jsonl").open("a") as file:
        for step, odd in enumerate(ODD_FIGURES, start=41):
            row = {"step": step, "loss": odd, "seconds": odd, "images": odd, "ddpo/reward/shapes": odd, "odd": odd}
            file.write(json.dumps(row) + "\n")
    with (run / "evaluations.jsonl").open("a") as file:
        for step, odd in enumerate(ODD_FIGURES):
            file.write(json.dumps({"step": step, "guidance": odd}) + "\n")
            file.write(json.dumps({"step": step, "guidance": 1.0, "strict": odd, "reward/shapes": odd}) + "\n")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    odd_keys = {"list": [1, {2: 3, "x": float("nan")}], "mixed": {0: 1, "a": 2}, "text": "half \ud800"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | odd_keys))
    write_report([run, write_run(tmp_path / "other", rank=4)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = json.loads(re.search('id="data">(.*?)</script>', text, re.S)[1], parse_constant=pytest.fail)
    curves = found["runs"][0]["curves"]
    assert curves["seconds"] is None and curves["images"] is None, "an axis has every step or is left out"
    assert "odd" not in curves["metrics"]
    assert {row["step"]: row["strict"] for row in found["runs"][0]["evaluations"]["shapes"]}[2] is None
    rewards = [row["rewards"] for row in found["runs"][0]["evaluations"]["shapes"] if row["step"] in (0, 40)]
    assert rewards == [{"a": 0.0}, {"b": 0.5}]
