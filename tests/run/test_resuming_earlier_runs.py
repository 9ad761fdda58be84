"""A run that an earlier version began, whose recipe lacks options that came in later, is resumed."""

import json
from copy import deepcopy
from io import StringIO

import pytest
import yaml
from newer_versions import change_options
from rich.console import Console
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.target import open_target
from agsm_rl.recipe import earlier
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.lifecycle import train


@pytest.fixture
def content(tiny_checkpoint):
    """Score matching over LoRA on the tiny base, as data."""
    return {
        "steps": 2,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "objectives": [
            {"use": "score_matching", "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2}}
        ],
        "checkpoint": {"every": 1},
        "sample": {"prompts": ["a red star"], "num_images": 1, "num_steps": 1},
        "track": [],
    }


@pytest.fixture
def folder(content, tmp_path):
    """A run of two steps."""
    return train(Recipe.from_data(content), tmp_path / "run", console=Console(file=StringIO()))


def resumed(content, folder):
    train(Recipe.from_data(content), folder, resume=True, console=Console(file=StringIO()))
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def newer(monkeypatch):
    """A later version, in which the objective and the backbone have one more option."""
    change_options(monkeypatch, "objectives", "score_matching", newer=0.0)
    change_options(monkeypatch, "backbones", "stable_diffusion", newer=0.0)


def test_an_earlier_run_is_resumed_while_newer_options_are_not_set(content, folder, newer):
    assert resumed(content | {"steps": 3}, folder) == [1, 2, 3]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["objectives"][0]["newer"] == 0.0


def test_a_newer_option_that_is_set_is_refused_with_both_values(content, folder, newer):
    content["objectives"][0]["newer"] = 0.5
    with pytest.raises(UserError, match=r"started with objectives\[0\].newer = 0.0, but now it is 0.5"):
        resumed(content | {"steps": 3}, folder)


def test_a_changed_default_is_refused_with_both_values(content, folder, monkeypatch):
    change_options(monkeypatch, "objectives", "score_matching", caption_dropout=0.5)
    with pytest.raises(UserError, match=r"started with objectives\[0\].caption_dropout = 0.0, but now it is 0.5"):
        resumed(content | {"steps": 3}, folder)


def test_the_recipe_of_an_earlier_run_gets_the_first_default_of_a_newer_option(folder, monkeypatch):
    record = deepcopy(earlier._first_defaults())
    monkeypatch.setattr(earlier, "_first_defaults", lambda: record)
    for kind, name in (("objectives", "score_matching"), ("backbones", "stable_diffusion")):
        change_options(monkeypatch, kind, name, newer=0.25)
        record[kind][name]["newer"] = 0.0
    assert open_target(str(folder)).block["newer"] == 0.0
    result = CliRunner().invoke(app, ["train", str(folder / "recipe.yaml"), "--resume", "--set", "steps=3"])
    assert result.exit_code == 0, result.output
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recipe["steps"], recipe["objectives"][0]["newer"], recipe["backbone"]["newer"]) == (3, 0.0, 0.0)
