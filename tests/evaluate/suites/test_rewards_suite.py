"""`agsm-rl eval --suite rewards`: any rewards by name, means over prompts, and wins on the same prompts and noise."""

import json
import sys

import numpy as np
import pytest
import yaml
from agsm_rl_rewards.brightness import Brightness
from newer_versions import change_options
from PIL import Image
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.reward_options import parse_rewards
from agsm_rl.evaluate.suites.rewards import RewardsResult
from agsm_rl.evaluate.suites.shapes import suite_prompts
from agsm_rl.export.attach import save_adapters
from agsm_rl.report.eval_file import read_evaluation


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)])


def folder_of(path, brightness):
    """One flat picture a value, by prompt and image."""
    for index, row in enumerate(brightness):
        samples = path / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"prompt": f"picture {index}"}))
        for number, value in enumerate(row):
            Image.new("L", (8 + 4 * (index % 2), 8), value).convert("RGB").save(samples / f"{number:04d}.png")
    return path


OURS = [[255, 51], [102, 102], [0, 255], [153, 204], [51, 0]]
THEIRS = [[51, 51], [102, 51], [0, 204], [204, 153], [0, 0]]


def test_a_mean_is_over_prompts_with_an_interval_around_it(command, tmp_path):
    folder_of(tmp_path / "ours", OURS)
    result = command("ours", "--suite", "rewards", "--reward", "brightness", "--json", "e.json")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "e.json").read_text())
    means = np.array(OURS).mean(1) / 255
    row = content["tags"]["brightness"]
    assert (content["suite"], content["num_images"], content["num_prompts"], row["total"]) == ("rewards", 10, 5, 10)
    assert content["overall"] == row["score"] == pytest.approx(means.mean(), abs=1e-6)
    assert means.min() < row["low"] < row["score"] < row["high"] < means.max()
    assert content["images"][0] == {
        "prompt": "picture 0",
        "scores": {"brightness": [1.0, pytest.approx(0.2)]},
        "filenames": [f"ours/00000/samples/000{number}.png" for number in (0, 1)],
    }


def test_against_another_target_the_difference_is_paired_and_a_tie_is_half_a_win(command, tmp_path):
    folder_of(tmp_path / "ours", OURS)
    folder_of(tmp_path / "theirs", THEIRS)
    more = ("--suite", "rewards", "--reward", "brightness", "--json", "e.json")
    result = command("ours", *more, "--against", "theirs")
    assert result.exit_code == 0, result.output
    assert "this: ours; other: theirs" in result.stdout
    content = json.loads((tmp_path / "e.json").read_text())
    found = content["rewards"]["brightness"]
    changes = (np.array(OURS) - np.array(THEIRS)).mean(1) / 255
    assert found["difference"]["value"] == pytest.approx(changes.mean(), abs=1e-6)
    # Wins and half of the ties, of two images each: 1.5, 1.5, 1.5, 1, 1.5 of 10.
    assert found["win_rate"]["score"] == pytest.approx(0.7)
    assert found["win_rate"]["low"] < 0.7 < found["win_rate"]["high"]
    assert content["other"]["target"] == "theirs" and content["same_noise"] is False
    swapped = command("theirs", *more, "--against", "ours")
    assert swapped.exit_code == 0
    assert json.loads((tmp_path / "e.json").read_text())["rewards"]["brightness"]["win_rate"]["score"] == pytest.approx(
        0.3
    )


def test_what_one_prompt_cannot_tell_is_null_in_the_json(command, tmp_path):
    folder_of(tmp_path / "ours", OURS[:1])
    folder_of(tmp_path / "theirs", THEIRS[:1])
    more = ("--suite", "rewards", "--reward", "brightness", "--json", "e.json")
    assert command("ours", *more, "--against", "theirs").exit_code == 0

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "e.json").read_text(), parse_constant=refuse)
    assert content["rewards"]["brightness"]["difference"]["low"] is None


def test_two_models_are_drawn_on_the_same_prompts_and_noise(command, tmp_path, tiny_checkpoint):
    (tmp_path / "mine.txt").write_text("a red star\n\n a blue circle \ntwo squares\n")
    arguments = (tiny_checkpoint, "--suite", "rewards", "--reward", "brightness", "--reward", "jpeg_compressibility")
    how = ("--prompts", "mine.txt", "--num-steps", 2, "--images", "im", "--json", "e.json")
    result = command(*arguments, *how, "--against", tiny_checkpoint)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "e.json").read_text())
    assert [row["prompt"] for row in content["images"]] == ["a red star", "a blue circle", "two squares"]
    assert content["same_noise"] is True
    measured = read_evaluation(tmp_path / "e.json").first
    assert list(measured.scores) == ["brightness", "jpeg_compressibility"]
    for judged in (*measured.base.values(), *measured.trained.values()):
        assert len(judged.files) == 3 and all((tmp_path / file).is_file() for file in judged.files)
    for label in ("brightness", "jpeg_compressibility"):
        assert content["rewards"][label]["difference"] == {"value": 0, "low": 0, "high": 0}
        assert content["rewards"][label]["win_rate"]["score"] == 0.5
    for picture in (tmp_path / "im").glob("0*/samples/*.png"):
        assert picture.read_bytes() == (tmp_path / "im/against" / picture.relative_to(tmp_path / "im")).read_bytes()


def test_a_model_is_drawn_for_the_prompts_of_a_folder_that_it_is_compared_with(command, tmp_path, tiny_checkpoint):
    how = ("--suite", "rewards", "--reward", "brightness", "--json", "e.json")
    (tmp_path / "mine.txt").write_text("a red star\na blue circle\n")
    drawing = ("--prompts", "mine.txt", "--num-steps", 1, "--seed", 7, "--guidance", 2, "--num-images", 3)
    assert command(tiny_checkpoint, *how, *drawing, "--images", "im").exit_code == 0
    result = command("im", *how, "--against", tiny_checkpoint)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["same_noise"] is True and content["other"]["num_images"] == 3
    assert content["rewards"]["brightness"]["difference"]["value"] == 0


def test_the_base_of_a_run_is_compared_with_it(command, tmp_path, tiny_checkpoint, make_policy):
    policy = make_policy()
    for parameter in policy.parameters().values():
        parameter.data.add_(0.5)
    save_adapters(policy.adapters, tmp_path / "adapter", metadata={})
    (tmp_path / "mine.txt").write_text("a red star\na blue circle\n")
    how = ("--suite", "rewards", "--reward", "brightness", "--prompts", "mine.txt", "--num-steps", 2)
    result = command("adapter", "--base", tiny_checkpoint, *how, "--compare", "--images", "im", "--json", "e.json")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["same_noise"] is True and content["difference"]["overall"]["value"] != 0
    assert content["base"]["drawing"]["adapters"] == {} != content["drawing"]["adapters"]
    plain = command(tiny_checkpoint, *how, "--json", "plain.json")
    assert plain.exit_code == 0, plain.output
    kept = [{key: row[key] for key in ("prompt", "scores")} for row in content["base"]["images"]]
    assert json.loads((tmp_path / "plain.json").read_text())["images"] == kept


def test_more_images_than_prompts_are_further_images_of_them(command, tmp_path, tiny_checkpoint):
    (tmp_path / "mine.txt").write_text("a red star\na blue circle\n")
    how = ("--prompts", "mine.txt", "--num-steps", 1, "--num-images", 3, "--json", "e.json")
    result = command(tiny_checkpoint, "--suite", "rewards", "--reward", "brightness", *how)
    assert result.exit_code == 0, result.output
    assert [len(row["scores"]["brightness"]) for row in json.loads((tmp_path / "e.json").read_text())["images"]] == [
        2,
        1,
    ]


def test_a_run_is_measured_by_its_own_rewards_on_its_own_prompts(command, tmp_path, tiny_checkpoint, make_policy):
    content = {
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "evaluate": {"split": "validation", "seed": 5, "rewards": {"light": {"use": "brightness"}}},
    }
    save_adapters(make_policy().adapters, tmp_path / "run/adapter", metadata={})
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(content))
    how = ("--suite", "rewards", "--num-images", 3, "--num-steps", 1, "--json", "e.json")
    result = command("run", *how)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert list(found["tags"]) == ["brightness"]
    assert [row["prompt"] for row in found["images"]] == suite_prompts("validation", 3, 5)
    given = command("run", *how, "--reward", "jpeg_compressibility")
    assert given.exit_code == 0 and list(json.loads((tmp_path / "e.json").read_text())["tags"]) == [
        "jpeg_compressibility"
    ]


COUNTED = """
import torch

class Counted:
    name, range, differentiable = "counted", (0.0, 1.0), False

    def __init__(self, *, scale: float = 1.0, mode: str = "a", size: int | None = None) -> None:
        self.scale = scale

    def __call__(self, images, prompts):
        with open("calls.txt", "a") as file:
            file.write("".join(prompt + "\\n" for prompt in prompts))
        return self.scale * images.mean((1, 2, 3))

class Wrong(Counted):
    name = "wrong"
    def __init__(self) -> None:
        self.scale = float("nan")
"""


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A module of one's own with a reward that keeps a record."""
    (tmp_path / "counted_rewards.py").write_text(COUNTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: (tmp_path / "calls.txt").read_text().split("\n")[:-1]
    sys.modules.pop("counted_rewards", None)


def test_a_score_that_is_there_is_not_computed_again_and_another_option_is_another_score(command, counted, tmp_path):
    folder_of(tmp_path / "ours", OURS[:2])
    first = ("ours", "--suite", "rewards", "--allow-import", "counted_rewards", "--json", "e.json")
    assert command(*first, "--reward", "counted_rewards:Counted:scale=2").exit_code == 0
    assert len(counted()) == 4
    assert command(*first, "--reward", "counted_rewards:Counted:scale=2").exit_code == 0
    assert len(counted()) == 4
    result = command(*first, "--reward", "counted_rewards:Counted:scale=3,mode=b")
    assert result.exit_code == 0, result.output
    assert len(counted()) == 8
    label, row = next(iter(json.loads((tmp_path / "e.json").read_text())["tags"].items()))
    assert label == "counted_rewards:Counted:scale=3.0,mode=b"
    assert row["score"] == pytest.approx(3 * np.mean(OURS[:2]) / 255, abs=1e-6)


def test_a_score_holds_when_its_reward_has_a_newer_option_until_that_is_set(command, tmp_path, monkeypatch):
    folder_of(tmp_path / "ours", OURS[:1])
    scored = []
    score = Brightness.__call__
    monkeypatch.setattr(Brightness, "__call__", lambda *given: scored.append(given) or score(*given))
    first = ("ours", "--suite", "rewards", "--json", "e.json", "--reward")
    assert command(*first, "brightness").exit_code == 0
    count = len(scored)
    assert count > 0
    change_options(monkeypatch, "rewards", "brightness", newer=0.0)
    assert command(*first, "brightness").exit_code == 0
    assert len(scored) == count
    assert command(*first, "brightness:newer=0.5").exit_code == 0
    assert len(scored) == 2 * count


def test_a_score_that_is_no_number_stops_with_the_reward_s_name(command, counted, tmp_path):
    folder_of(tmp_path / "ours", OURS[:2])
    result = command(
        "ours", "--suite", "rewards", "--allow-import", "counted_rewards", "--reward", "counted_rewards:Wrong"
    )
    assert result.exit_code == 2 and "reward 'wrong'" in result.stderr and "nan" in result.stderr


def test_a_reward_that_gives_everything_the_same_score_is_named(command, tmp_path):
    folder_of(tmp_path / "ours", [[51], [51]])
    result = command("ours", "--suite", "rewards", "--reward", "brightness", "--json", "e.json")
    assert result.exit_code == 0 and "brightness gave every image the same score" in result.stdout
    assert json.loads((tmp_path / "e.json").read_text())["constant"] == ["brightness"]


def test_options_take_the_types_of_the_constructor(counted):
    (spec,) = parse_rewards(["counted_rewards:Counted:scale=2,mode=2.1,size=null"], allow_imports=["counted_rewards"])
    assert (spec.options, spec.weight) == ({"scale": 2.0, "mode": "2.1", "size": None}, 1.0)
    (spec,) = parse_rewards(["http:url=http://127.0.0.1:8765,retries=2"])
    assert (spec.name, spec.options) == ("http", {"url": "http://127.0.0.1:8765", "retries": 2})


def test_a_yaml_weighs_rewards_into_the_overall_figure(command, tmp_path):
    folder_of(tmp_path / "ours", OURS)
    (tmp_path / "r.yaml").write_text("rewards:\n  brightness: 0.5\n  shapes: {weight: 2, verdict: lenient}\n")
    specs = parse_rewards([], tmp_path / "r.yaml")
    assert [(spec.label, spec.weight) for spec in specs] == [("brightness", 0.5), ("shapes:verdict=lenient", 2.0)]
    scores = {"a": {0: [1.0, 3.0], 1: [0.0, 0.0]}, "b": {0: [1.0, 1.0], 1: [4.0, 6.0]}}
    result = RewardsResult(scores, {0: "x", 1: "y"}, {"a": 0.5, "b": 2.0})
    assert result.overall().value == pytest.approx(0.5 * 1 + 2 * 3)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["brightnes"], "Did you mean 'brightness'?"),
        (["shapes:verdct=lenient"], "Did you mean 'verdict'?"),
        (["shapes:verdict=x"], "verdict"),
        (["shapes:verdict=lenient,x"], "'x' is not an option"),
        (["os:system"], "--allow-import os"),
        (["shapes:verdict=[a"], r"verdict=\[a: verdict: line 1: "),
        (["brightness", "brightness"], "listed twice"),
        ([], "no reward given"),
    ],
)
def test_rewards_that_cannot_be_are_told(given, word):
    with pytest.raises(UserError, match=word.replace("?", r"\?")):
        parse_rewards(given)


@pytest.mark.parametrize("text", ["- a", "brightness: x", "brightness: [", "{}", "brightness: true", "näme: 1"])
def test_a_yaml_that_is_no_rewards_is_named(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="r.yaml"):
        parse_rewards([], tmp_path / "r.yaml")


def test_without_prompts_or_with_other_prompts_the_user_is_told(command, tmp_path, tiny_checkpoint):
    nothing = command(tiny_checkpoint, "--suite", "rewards", "--reward", "brightness")
    assert nothing.exit_code == 2 and "--prompts" in nothing.stderr
    folder_of(tmp_path / "ours", OURS)
    folder_of(tmp_path / "theirs", THEIRS[:3])
    unlike = command("ours", "--suite", "rewards", "--reward", "brightness", "--against", "theirs")
    assert unlike.exit_code == 2 and "cannot be paired" in unlike.stderr


def test_a_rewards_file_whose_aliases_stand_for_billions_of_values_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, "shapes: {weight: *a9}"]))
    with pytest.raises(UserError, match="r.yaml.*values"):
        parse_rewards([], tmp_path / "r.yaml")
