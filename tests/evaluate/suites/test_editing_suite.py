"""The editing suite: exact shares on the shapes world, rewards against structure on a list, fair comparison."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings, draw_pictures, plan
from agsm_rl.evaluate.structure import Dino, like, ssim
from agsm_rl.evaluate.suite import Judged
from agsm_rl.evaluate.suites.editing import Editing
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.reward_specs import RewardSpec
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.recipe.suites import make_suites
from agsm_rl.report.eval_rows import scores_of
from agsm_rl.shapes import world
from agsm_rl.shapes.edits import ShapeEdit


def brightness():
    return RewardSpec("brightness", {}, 2.0, {})


def as_asked(row):
    """The drawing that a row's edit asks for."""
    edit = ShapeEdit.from_json(row, row["prompt"])
    first = world.parse(edit.target).groups[0]
    changed = [
        world.DrawnObject(first.shape, first.color, item.x, item.y, item.radius)
        for item in edit.objects[: edit.changing]
    ]
    return world.render((*changed, *edit.objects[edit.changing :]))


def unchanged(row):
    return world.render(ShapeEdit.from_json(row, row["prompt"]).objects)


def result_of(suite, editor):
    rows = suite.prompts()
    pictures = [editor(row) for row in rows.values()]
    judged = suite.judge(pictures, [row["prompt"] for row in rows.values()], list(rows.values()))
    return suite.result([Judged(n, 0, row, found) for (n, row), found in zip(rows.items(), judged, strict=True)])


@pytest.fixture(scope="module")
def suite():
    return Editing(split="validation", num_images=6)


@pytest.fixture(scope="module")
def perfect(suite):
    return result_of(suite, as_asked)


@pytest.fixture(scope="module")
def idle(suite):
    return result_of(suite, unchanged)


def test_what_changed_and_what_stayed_are_shares_of_their_own(perfect, idle):
    assert {name: perfect.scores()[name].value for name in ("overall", "changed", "kept")} == {
        "overall": 1.0,
        "changed": 1.0,
        "kept": 1.0,
    }
    assert {name: idle.scores()[name].value for name in ("overall", "changed", "kept")} == {
        "overall": 0.0,
        "changed": 0.0,
        "kept": 1.0,
    }
    assert idle.scores()["ssim"].value == pytest.approx(1.0) and perfect.scores()["ssim"].value < 1


def test_eval_json_has_the_contracts_keys_and_a_row_per_edit(perfect, idle):
    content = json.loads(json.dumps(perfect.to_json() | perfect.against(idle)))
    assert (content["suite"], content["num_images"], content["overall"]) == ("editing", 6, 1.0)
    assert content["tags"]["color"]["total"] == content["tags"]["shape"]["total"] == 3
    assert {"prompt", "from", "tag", "correct", "changed", "kept", "reason", "scores"} <= set(content["images"][0])
    assert content["images"][0]["scores"]["ssim"] < 1
    assert content["difference"]["overall"]["value"] > 0.5 and content["difference"]["kept"]["overall"]["value"] == 0
    assert content["difference"]["measures"]["ssim"]["value"] < 0


def test_the_tables_show_both_models(perfect, idle):
    console = Console(record=True, width=100)
    perfect.show(console, idle, labels=("base", "trained"))
    text = console.export_text()
    for word in ("changed", "kept", "color", "shape", "ssim", "base", "trained"):
        assert word in text


def test_results_of_different_edits_are_not_compared(perfect):
    with pytest.raises(UserError, match="different edits"):
        perfect.against(result_of(Editing(split="validation", num_images=6, seed=1), unchanged))


def test_the_model_edits_the_drawings_under_both_prompts_and_the_suites_settings(backbone):
    def drawn(suffix="", **settings):
        suite = Editing(split="validation", num_images=2, **settings)
        how = DrawingSettings(guidance=3.0, num_steps=2, prompt_suffix=suffix)
        return draw_pictures(suite, backbone, plan(suite.prompts(), 2), how)

    first = drawn(strength=0.5)
    assert [picture.size for picture in first] == [(backbone.resolution,) * 2] * 2
    assert first == drawn(strength=0.5) and first != drawn(strength=1.0) and first != drawn(", verified", strength=0.5)


def test_the_settings_of_an_edit_are_part_of_its_metadata():
    rows = Editing(num_images=1, strength=0.5).prompts(), Editing(num_images=1, strength=0.6).prompts()
    assert rows[0][0] != rows[1][0]


@pytest.fixture
def edits_file(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "from": "noise", "to": f"more noise {number}"})
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_list_is_scored_by_rewards_against_the_structure_kept(edits_file):
    suite = Editing(prompts=str(edits_file), rewards=[brightness()])
    assert suite.num_images == 3 and list(suite.score_names()) == ["ssim", "brightness"]
    same = result_of(suite, lambda row: like(Image.open(row["image"]), Image.new("RGB", (16, 16))))
    white = result_of(suite, lambda row: Image.new("RGB", (16, 16), "white"))
    assert same.scores()["ssim"].value == pytest.approx(1.0)
    assert white.scores()["brightness"].value == pytest.approx(1.0) and white.scores()["ssim"].value < 0.5
    content = white.to_json()
    assert content["overall"] == pytest.approx(2.0)  # the reward's weight
    assert set(content["tags"]) == {"ssim", "brightness"}
    assert white.against(same)["difference"]["overall"]["value"] > 0


def test_a_list_may_have_any_further_column(edits_file):
    rows = [json.loads(line) | {"objects": "a star"} for line in edits_file.read_text().splitlines()]
    edits_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = Editing(prompts=str(edits_file), rewards=[brightness()])
    result = result_of(suite, lambda row: like(Image.open(row["image"]), Image.new("RGB", (16, 16))))
    assert result.scores()["ssim"].value == pytest.approx(1.0)


def test_a_list_needs_a_reward_and_rows_that_say_what_to_edit(edits_file):
    with pytest.raises(UserError, match="scored by rewards"):
        Editing(prompts=str(edits_file))
    edits_file.write_text(json.dumps({"image": "gone.png", "from": "a", "to": "b"}) + "\n")
    with pytest.raises(UserError, match="row 1: there is no image .*gone.png"):
        Editing(prompts=str(edits_file), rewards=[brightness()]).prompts()
    edits_file.write_text(json.dumps({"image": "0.png", "to": "b"}) + "\n")
    with pytest.raises(UserError, match="row 1: `from` is missing"):
        Editing(prompts=str(edits_file), rewards=[brightness()]).prompts()


def test_a_reward_with_the_name_of_an_own_score_is_refused():
    with pytest.raises(UserError, match="'kept' is one of its own scores"):
        Editing(rewards=[replace(brightness(), key="kept")])


def test_a_recipe_measures_edits_with_rewards_or_without():
    blocks = {
        "edits": {"use": "editing", "strength": 0.5, "seed": None},
        "bright": {"use": "editing", "rewards": {"brightness": {}}},
    }
    plain, scored = make_suites(Evaluate.model_validate({"suites": blocks, "seed": 3}), Parts(where="test"))
    assert plain.score_names() == ["overall", "changed", "kept", "ssim"]
    assert scored.score_names() == ["overall", "changed", "kept", "ssim", "brightness"]
    assert plain.suite.seed == 3 and plain.suite.settings["strength"] == 0.5


def test_eval_measures_edits_and_their_rewards(tiny_sd3_checkpoint, tmp_path):
    how = ["--num-images", "2", "--num-steps", "2", "--option", "strength=0.5", "--any-base", "--reward", "brightness"]
    file = tmp_path / "edits.json"
    given = ["eval", str(tiny_sd3_checkpoint), "--suite", "editing", *how, "--json", str(file)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["num_images"] == 2 and set(content["measures"]) == {"ssim", "brightness"}
    assert set(scores_of(content)) == {"correct", "changed", "kept", "ssim", "brightness"}


def test_a_base_of_another_world_is_refused_unless_asked(tmp_path):
    other = {"checkpoint": str(tmp_path)}
    with pytest.raises(UserError, match="prompts: edits.jsonl"):
        Editing().check_base(other)
    Editing(any_base=True).check_base(other)
    Editing().check_base({"checkpoint": "builtin:shapes-sd3"})


def test_dino_likens_an_image_to_itself_most_and_missing_weights_are_named(tmp_path, monkeypatch):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    dino = Dino(str(tmp_path))
    assert dino.likeness(noise, noise) == pytest.approx(1.0, abs=1e-5)
    assert dino.likeness(noise, Image.new("RGB", (32, 32), "red")) < 0.999
    assert ssim(noise, noise) == 1.0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="dino: .*facebook/dinov2-base"):
        Dino(str(tmp_path / "nowhere"))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="dino: .*facebook/dinov2-base"):
        Dino(str(tmp_path))
