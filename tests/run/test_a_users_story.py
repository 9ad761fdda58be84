"""A new user's story, on each layout: own checkpoint, prompts and reward; best by a held-out reward; a report."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from agsm_rl.cli.commands import app

REWARD = '''"""A reward of the user's own."""


def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
'''
CHECKPOINTS = ["tiny_checkpoint", "tiny_xl_checkpoint", "tiny_sd3_checkpoint"]


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_own_model_prompts_and_reward_are_trained_measured_and_reported(layout, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\ntwo green squares\n")
    drawn = {"use": "rollouts", "prompts": "prompts.txt", "rewards": {"own_reward:redness": 1.0}}
    drawn |= {"num_prompts": 2, "images_per_prompt": 2, "num_steps": 2, "guidance": 1.0}
    suite = {"use": "rewards", "prompts": "prompts.txt", "rewards": {"sharpness": {}}, "num_images": 3}
    recipe = {
        "steps": 2,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(request.getfixturevalue(layout)), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "objectives": [{"use": "ddpo", "source": drawn}],
        "evaluate": {"every": 1, "guidance": [1.0], "num_steps": 2, "suites": {"mine": suite}},
        "checkpoint": {"every": 1, "best": "mine/sharpness"},
        "sample": {"prompts": "prompts.txt", "num_images": 2, "num_steps": 1},
        "track": [],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    allowed = ["--allow-import", "own_reward"]
    for command in (["check", "recipe.yaml", *allowed], ["train", "recipe.yaml", "--run-dir", "run", *allowed]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "run/eval.json").read_text())
    assert measured["suite"] == "rewards" and "mine/sharpness" in json.dumps(measured["best"])
    assert (tmp_path / "run/adapter-best").is_dir()
    result = CliRunner().invoke(app, ["report", "run", "-o", "report.html"])
    assert result.exit_code == 0, result.output
    assert "sharpness" in (tmp_path / "report.html").read_text()
