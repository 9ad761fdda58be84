"""`agsm-rl edit`: source, edit, the base's edit and a grid, and nothing that is there is overwritten."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from agsm_rl import save_adapters
from agsm_rl.cli.commands import app
from agsm_rl.shapes import world

FROM_TO = ("--from", "a red star", "--to", "two blue circles")


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Run `agsm-rl edit ...` in a folder with star.png, with two steps."""
    monkeypatch.chdir(tmp_path)
    world.render((world.DrawnObject("star", "red", 16, 16, 8),)).resize((40, 48)).save("star.png")
    return lambda *given: CliRunner().invoke(app, ["edit", *map(str, given), "--num-steps", "2"])


@pytest.fixture
def adapter(policy, tiny_checkpoint, tmp_path):
    """A folder of exported adapters that change the picture."""
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.5)
    save_adapters(policy.adapters, tmp_path / "adapter", metadata={"checkpoint": str(tiny_checkpoint)})
    return "adapter"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_refused(result, *words):
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_source_edit_grid_and_settings_are_written_beside_what_is_there(edit, tiny_checkpoint, tmp_path):
    first = edit(tiny_checkpoint, "star.png", *FROM_TO, "-o", "out")
    names = ["star-source.png", "star-edited.png", "star-grid.jpg", "star-edit.json"]
    assert first.stdout.split() == [f"out/{name}" for name in names], first.output
    before = content(tmp_path / "out")
    settings = json.loads(before["star-edit.json"])
    assert (settings["from"], settings["to"], settings["method"]) == ("a red star", "two blue circles", "inversion")
    assert Image.open(tmp_path / "out/star-source.png").size == Image.open(tmp_path / "out/star-edited.png").size
    again = edit(tiny_checkpoint, "star.png", *FROM_TO, "-o", "out", "--strength", 0.5)
    assert again.exit_code == 0, again.output
    after = content(tmp_path / "out")
    assert {name: after[name] for name in before} == before and "star-edited-2.png" in after
    assert after["star-edited-2.png"] != after["star-edited.png"]


def test_the_bases_edit_beside_is_what_the_base_alone_would_draw(edit, adapter, tiny_checkpoint, tmp_path):
    how = (*FROM_TO, "--guidance", 3, "--strength", 0.5)
    result = edit(adapter, "star.png", *how, "--compare", "-o", "mine")
    assert result.exit_code == 0, result.output
    assert edit(tiny_checkpoint, "star.png", *how, "-o", "base").exit_code == 0
    mine, base = content(tmp_path / "mine"), content(tmp_path / "base")
    assert mine["star-base.png"] == base["star-edited.png"] != mine["star-edited.png"]
    assert mine["star-source.png"] == base["star-source.png"]


def test_flowedit_of_a_flow_model_takes_its_own_options(edit, tiny_sd3_checkpoint, tmp_path):
    how = (*FROM_TO, "--strength", 1, "--n-avg", 2, "--n-min", 1, "--guidance", 4, "--source-guidance", 2, "--seed", 3)
    result = edit(tiny_sd3_checkpoint, "star.png", *how, "-o", "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/star-edit.json").read_text())
    given = {"method": "flowedit", "n_avg": 2, "n_min": 1, "n_max": 2, "source_guidance": 2, "guidance": 4, "seed": 3}
    assert given.items() <= found.items()


def test_what_cannot_be_edited_is_refused_before_anything_is_written(edit, tiny_checkpoint, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    assert_refused(edit("nowhere", "gone.png", *FROM_TO), "IMAGE gone.png", "no such file")
    assert_refused(edit("nowhere", "text.png", *FROM_TO), "IMAGE text.png", "not an image")
    assert_refused(edit("nowhere", ".", *FROM_TO), "IMAGE .", "a folder")
    assert_refused(edit("nowhere", "star.png", *FROM_TO, "--source-guidance", "nan"), "--source-guidance: got nan")
    assert_refused(edit(tiny_checkpoint, "star.png", *FROM_TO, "--method", "flowedit"), "needs a model that predicts")
    assert_refused(edit(tiny_checkpoint, "star.png", *FROM_TO, "--n-avg", 2), "n_avg: belongs to FlowEdit")
    assert_refused(edit(tiny_checkpoint, "star.png", *FROM_TO, "--strength", 2), "strength: got 2.0")
    assert_refused(edit(tiny_checkpoint, "star.png", *FROM_TO, "--compare"), "--compare", "a base itself")
    assert not (tmp_path / "edits").exists()


def test_both_prompts_are_needed(edit, tiny_checkpoint):
    result = edit(tiny_checkpoint, "star.png", "--from", "a red star")
    assert result.exit_code == 2 and "--to" in result.stderr
