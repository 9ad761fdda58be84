"""Runs that read the base's figures from the cache: the same files, the base not drawn, and when it is drawn again."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from agsm_rl.evaluate import measured
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.report.page import write_report
from agsm_rl.run.lifecycle import train

EVALUATE = {"every": 1, "num_images": 3, "num_steps": 1, "guidance": [1.0, 2.0], "rewards": ["brightness"]}


@pytest.fixture
def run(tiny_checkpoint, tmp_path, monkeypatch):
    """Train two steps, evaluated after each; returns the folder, what was printed, and how often the base was drawn."""

    def run(name: str, **changes):
        recipe = Recipe.from_data(
            {
                "steps": 2,
                "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
                "adapters": {"lora": {"use": "lora", "rank": 2}},
                "objectives": [
                    {"use": "score_matching", "source": {"use": "pairs", "dataset": "builtin:shapes", "num_images": 8}}
                ],
                "optimizer": {"learning_rate": 0.03},
                "evaluate": EVALUATE | changes,
                "sample": {"prompts": ["a red star"], "num_images": 1, "num_steps": 1},
                "track": [],
            }
        )
        drawn, draw = [], measured.draw_and_judge

        def noting(backbone, *arguments, **options):
            drawn.append(not any(adapter.bank for adapter in backbone.adapters))
            return draw(backbone, *arguments, **options)

        screen = StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(measured, "draw_and_judge", noting)
            folder = train(recipe, tmp_path / name, console=Console(file=screen, width=1000))
        assert len(drawn) - sum(drawn) == 4  # the trained model: twice, at two guidances
        return folder, screen.getvalue(), sum(drawn)

    return run


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("samples/**/*.png")}


def test_a_run_with_a_warm_cache_draws_no_base_and_writes_the_same_files(run, tmp_path):
    cold, said, drawn = run("a/run")
    assert drawn == 2 and "are read from" not in said
    warm, said, drawn = run("b/run")
    assert drawn == 0
    assert said.count("the base's figures of shapes, measured earlier with the same settings, are read from") == 1
    for name in ("eval.json", "evaluations.jsonl"):
        assert (cold / name).read_bytes() == (warm / name).read_bytes()
    assert pictures(cold) == pictures(warm) and "samples/before_after.png" in pictures(warm)
    shutil.copyfile(cold / "metrics.jsonl", warm / "metrics.jsonl")  # which have the seconds of each step
    reports = [write_report([folder], folder / "again.html").read_text() for folder in (cold, warm)]
    assert reports[0].replace(str(tmp_path / "a"), "") == reports[1].replace(str(tmp_path / "b"), "")


def test_the_base_is_measured_again_when_it_is_asked_for_or_anything_else_is_evaluated(run):
    assert run("first")[2] == 2
    assert run("asked", keep_base=False)[2] == 2
    assert run("other", guidance=[1.0, 3.0])[2] == 1


@pytest.mark.parametrize("damage", ["a verdict", "a picture", "no picture", "half"])
def test_a_damaged_entry_is_measured_again_and_says_so(run, caplog, damage, monkeypatch, tmp_path):
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "cache"))
    before, *_ = run("before")
    file = next((tmp_path / "cache").glob("figures-*/shapes-guidance1-*.json"))
    text, picture = file.read_text(), file.with_suffix("") / "0001.png"
    if damage == "a verdict":
        content = json.loads(text)
        content["judged"][0][0]["row"]["correct"] ^= True
        file.write_text(json.dumps(content))
    elif damage == "half":
        file.write_text(text[: len(text) // 2])
    elif damage == "a picture":
        shutil.copyfile(picture.with_name("0002.png"), picture)
    else:
        picture.unlink()
    after, _, drawn = run("after")
    assert drawn == 1 and caplog.text.count(f"{file}: is damaged") == 1
    assert (before / "eval.json").read_bytes() == (after / "eval.json").read_bytes()
    assert run("again")[2] == 0


def test_a_cache_that_cannot_be_written_is_said_once_and_stops_nothing(run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "file/cache"))
    _, said, drawn = run("run")
    assert drawn == 2 and said.count("the base's figures are not kept for other runs:") == 1
    assert "set AGSM_RL_CACHE to another folder" in said
