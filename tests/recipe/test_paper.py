"""The AGSM paper's recipes and the script that redoes its tables: checked at full size, run at toy size."""

import hashlib
import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import paper_costs
import pytest
import reproduce
from paper_data import prepare
from paper_hashes import digest
from paper_plan import ARMS, HERE, MODELS, TABLES, Arm, Place, all_parts, parts_of
from paper_results import Results, Score, hashes, make_tables, problems_of, summary
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.recipe.yaml_file import read_yaml

RECIPES = sorted(file.stem for file in HERE.glob("*.yaml"))
PLACE = Place(out=Path("out"), data=Path("data"))


CHECKED = [arm for arm in ARMS.values() if arm.recipe and (not arm.sets or arm in paper_costs.CHANGED)]
"""One arm of each recipe, and the ablations; an arm of another U-Net is at full size what its recipe is."""


def model_of(recipe: str) -> str:
    return recipe.partition("_")[0]


@pytest.fixture(scope="session")
def full_size(tmp_path_factory):
    """A folder of each published model's configurations, made when it is asked for."""

    @cache
    def make(model: str) -> Path:
        return paper_costs.full_size(model, tmp_path_factory.mktemp("full") / model)[1]

    return make


def sets_of(arm: Arm) -> list[str]:
    """The --set of the command that trains an arm."""
    (command,) = (part.command for part in parts_of(arm, 1, PLACE, list(TABLES)) if part.name.endswith("/train"))
    return [value for word, value in pairwise(command) if word == "--set"]


@pytest.mark.parametrize(
    "arm",
    [pytest.param(arm, marks=() if arm.key == "sd15/agsm" else pytest.mark.slow, id=arm.key) for arm in CHECKED],
)
def test_a_recipe_holds_to_its_last_option_on_a_full_size_model_and_costs_what_is_recorded(arm, full_size, tmp_path):
    sets = sets_of(arm)
    assert set(arm.sets) <= set(sets)
    predicted = paper_costs.predicted(arm.recipe, full_size(arm.model), tmp_path, sets)
    costs = paper_costs.read()
    recorded = costs["arms"][arm.key] if arm in paper_costs.CHANGED else costs["recipes"][arm.recipe]
    exact = ("steps", "forward", "backward", "images", "drawn")
    assert {key: predicted[key] for key in exact} == {key: recorded[key] for key in exact}
    for key in ("peak_gib", "evaluating_gib"):
        assert predicted[key] == pytest.approx(recorded[key], rel=0.05), "run `reproduce.py costs`"


def test_every_row_of_the_published_tables_has_an_arm_and_every_recipe_is_used():
    rows = {row for table in TABLES.values() for row in table["rows"]}
    assert rows == {arm.published for arm in ARMS.values()}
    assert {arm.recipe for arm in ARMS.values() if arm.recipe} == set(RECIPES)
    assert set(paper_costs.read()["recipes"]) == set(RECIPES)
    assert {arm.recipe for arm in CHECKED} == set(RECIPES)


def test_the_page_has_the_table_of_the_recorded_costs_and_its_links_lead_to_files():
    text = paper_costs.PAGE.read_text(encoding="utf-8")
    assert text == paper_costs.with_table(text), "run `reproduce.py costs`"
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    assert [link for link in links if "://" not in link and not (HERE / link).exists()] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_draws_as_the_measurements_do(recipe):
    """The base is drawn by eval's options, the run by its recipe's: they must be the same."""
    content, model = read_yaml(HERE / f"{recipe}.yaml"), MODELS[model_of(recipe)]
    backbone, evaluate = content["backbone"], content["evaluate"]
    assert backbone["checkpoint"] == model.checkpoint and backbone.get("dtype", "float32") == model.dtype
    options = {
        f"{key}={str(backbone[key]).lower()}" for key in ("scheduler", "allow_tf32", "t5_length") if key in backbone
    }
    assert options == set(model.backbone)
    assert (evaluate["guidance"], evaluate["num_steps"]) == (model.guidance, model.num_steps)
    assert evaluate.get("resolution", backbone["resolution"]) == model.resolution


def test_the_headers_print_the_published_figures():
    rows = TABLES["coco"]["rows"]
    for model in MODELS:
        text = " ".join((HERE / f"{model}_agsm.yaml").read_text(encoding="utf-8").replace("#", " ").split())
        for row in (f"{model}/base", f"{model}/agsm"):
            figures = " / ".join(
                f"{rows[row][metric]:.2f}" for metric in ("image_reward", "clip_score", "hpsv2", "fid")
            )
            assert figures in text, row


def test_the_commands_of_an_arm_train_draw_and_measure_once_per_seed():
    parts = all_parts(PLACE, tables=["coco", "geneval"], arms=["sd3/base", "sd3/softrepa"], seeds=2)
    names = [part.name for part in parts]
    assert names[:3] == [f"sd3/base/seed0/{suite}" for suite in ("coco", "fid", "geneval")]
    trained = [f"sd3/softrepa/seed{seed}/{step}" for seed in (0, 1) for step in ("train", "coco", "fid", "geneval")]
    assert names[3:] == trained
    commands = {part.name: " ".join(part.command) for part in parts}
    assert "--set seed=1 --set adapters.tokens.seed=1" in commands["sd3/softrepa/seed1/train"]
    assert "out/sd3/softrepa/seed1/run/adapter-best --backbone t5_length=512" in commands["sd3/softrepa/seed1/coco"]
    assert "--num-images 5000" in commands["sd3/base/seed0/coco"]
    assert {part.command[0] for part in parts} == {"agsm-rl"}


def test_the_dry_run_prints_each_command_with_memory_and_time(capsys):
    run_reproduce(["run", "--dry-run", "--arm", "sd15/agsm", "--table", "coco", "--seeds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"# sd15/agsm/seed0/train: \d+ GiB, \d+\.\d h", lines[0])
    assert lines[1].startswith("agsm-rl train ") and "seed=0" in lines[1]
    assert re.match(r"# 3 commands, \d+\.\d h on one H100\. ", lines[-2]) and "neither was measured" in lines[-1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["run", "--table", "cocoa"], "Did you mean 'coco'?"),
        (["run", "--arm", "sd15/agms"], "Did you mean 'sd15/agsm'?"),
        (["run", "--gpu", "H200"], "allowed: A100, H100, RTX4090"),
        (["run", "--base", "sd15=x"], "together with --toy"),
        (["check", "nowhere.json"], "there is no such file"),
        (["data", "nowhere"], "annotations/captions_train2017.json"),
    ],
)
def test_a_mistake_ends_with_one_message(given, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        reproduce.main(given)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_the_toy_run_trains_measures_and_collects_and_a_second_one_finds_all_done(tiny_checkpoint, tmp_path, capsys):
    arguments = ["run", "--toy", "--out", str(tmp_path), "--base", f"sd15={tiny_checkpoint}", "--seeds", "1"]
    arguments += ["--arm", "sd15/base", "--arm", "sd15/agsm", "--table", "coco"]
    run_reproduce(arguments)
    file = tmp_path / "results.json"
    results = Results.model_validate_json(file.read_text())
    assert [command.name for command in results.commands] == [
        "sd15/base/seed0/coco", "sd15/agsm/seed0/train", "sd15/agsm/seed0/coco",
    ]  # fmt: skip
    figures = {(cell.arm, cell.metric): cell for cell in results.cells}
    measured = ("image_reward", "clip_score", "hpsv2", "pick_score")
    assert set(figures) == {(arm, name) for arm in ("sd15/base", "sd15/agsm") for name in measured}
    assert figures["sd15/agsm", "image_reward"].published == 34.5
    assert problems_of(file.read_text())[0].startswith("toy:")
    assert "34.50 → " in make_tables(results) and "A toy run" in make_tables(results)
    weights = "sd15/agsm/seed0/run/adapter/tokens.safetensors"
    assert [command.sha256 for command in results.commands] == [{}, *[{weights: digest(tmp_path / weights)}] * 2]
    capsys.readouterr()
    run_reproduce(arguments)
    assert "agsm-rl" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main([word.replace(str(tiny_checkpoint), "builtin:shapes-sd15") for word in arguments])
    assert "was made by another command" in capsys.readouterr().err


def run_reproduce(arguments: list[str]) -> None:
    """A command that ends well."""
    with pytest.raises(SystemExit) as ended:
        reproduce.main(arguments)
    assert ended.value.code in (0, None)


def test_a_command_that_fails_is_not_recorded_and_a_cut_training_is_resumed(tmp_path):
    place = Place(out=tmp_path, data=tmp_path, toy=True)
    parts = all_parts(place, tables=["coco"], arms=["sd15/agsm"], seeds=1)
    asked = []

    def cut(command):
        asked.append(command)
        parts[0].makes.mkdir(parents=True, exist_ok=True)
        (parts[0].makes / "recipe.yaml").write_text("steps: 2\n")
        return 1

    for _ in range(2):
        with pytest.raises(UserError, match="sd15/agsm/seed0/train: the command ended with exit code 1"):
            reproduce.run_all(parts, place, cut)
    assert asked == [parts[0].command, ("agsm-rl", "train", str(parts[0].makes), "--resume")]
    assert not list(tmp_path.glob("done/*"))


def test_a_measurement_is_recorded_with_its_data_and_not_taken_for_one_of_other_data(tmp_path):
    place = Place(out=tmp_path / "out", data=tmp_path)
    parts = all_parts(place, tables=["coco"], arms=["sd15/base"], seeds=1)[:1]
    captions = tmp_path / "coco_val_captions.txt"
    captions.write_text("a red circle\n")

    def measure(command):
        parts[0].makes.write_text(json.dumps({"num_images": 5000, "tags": {}}))
        return 0

    for _ in range(2):
        file = reproduce.run_all(parts, place, measure)
        (command,) = Results.model_validate_json(file.read_text()).commands
        assert command.sha256 == {"data/coco_val_captions.txt": hashlib.sha256(b"a red circle\n").hexdigest()}
    captions.write_text("a blue circle\n")
    with pytest.raises(UserError, match="was made with another data/coco_val_captions.txt than is there now"):
        reproduce.run_all(parts, place, measure)


def test_a_folder_s_hash_is_of_names_of_pictures_sizes_and_of_captions_every_letter(tmp_path):
    hashes = set()
    for name, size, captions in (("a", 3, "red"), ("a", 3, "red"), ("b", 3, "red"), ("a", 4, "red"), ("a", 3, "tan")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / f"{name}.jpg").write_bytes(b"x" * size)
        (folder / "metadata.jsonl").write_text(captions)
        hashes.add(digest(folder))
    assert len(hashes) == 4


CAPTIONS = "data/coco_val_captions.txt"


def a_file(**changes) -> dict:
    """A results file without a fault, of one figure of two seeds."""
    scores = [{"seed": seed, "value": 30.0 + seed, "low": 29.0, "high": 32.0, "images": 5000} for seed in (0, 1)]
    cell = {"table": "coco", "arm": "sd15/agsm", "metric": "image_reward", "published": 34.5, "scores": scores}
    cell |= summary([Score(**score) for score in scores])
    ran = {"command": ["agsm-rl"], "seconds": 1.0, "finished": "2026-01-01", "device": "GPU", "revision": "abc"}
    content = {"format": 1, "toy": False, "agsm_rl": "0", "revision": "abc", "platform": "x", "versions": {}}
    content |= {"recipes": hashes(), "cells": [cell]}
    content |= {"commands": [{"name": f"sd15/agsm/seed{seed}/coco", **ran} for seed in (0, 1)]}
    for command in content["commands"]:
        weights = command["name"].replace("coco", "run/adapter/tokens.safetensors")
        command["sha256"] = {CAPTIONS: "c" * 64, weights: command["name"]}
    return content | changes


def test_a_whole_file_passes_the_check():
    assert problems_of(json.dumps(a_file())) == []


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda file: file.update(toy=True), "toy: "),
        (lambda file: file.update(revision="abc+"), "a commit without changes"),
        (lambda file: file["commands"][0].update(revision="abc+"), "ran at abc+, the file was made at abc;"),
        (lambda file: file.update(surprise=1), "surprise: Extra inputs"),
        (lambda file: file["recipes"].update(sd15_agsm="0"), "sd15_agsm is not that of this checkout"),
        (lambda file: file["cells"][0].update(published=20.0), "published.json does not have"),
        (lambda file: file["cells"][0].update(mean=99.0), "does not follow from the scores"),
        (lambda file: file["cells"][0].update(metric="beauty"), "no such figure"),
        (lambda file: file["cells"][0]["scores"][0].update(images=50), "50 images; published with 5000"),
        (lambda file: file["cells"][0]["scores"][0].update(low=40.0), "outside its interval"),
        (lambda file: file["commands"].pop(), "seed 1: the command that measured it is missing"),
        (lambda file: file["cells"].append(file["cells"][0]), "is listed twice"),
        (lambda file: file["cells"].clear(), "there is no figure"),
        (lambda file: file["commands"][0].update(name="sd15/agsm/seed0/beauty"), "not one that reproduce.py runs"),
        (lambda file: file["commands"][0]["sha256"].pop(CAPTIONS), "seed0/coco lacks the SHA-256 of coco_val_captions"),
        (
            lambda file: file["commands"][1].update(sha256={CAPTIONS: "c" * 64}),
            "SHA-256 of sd15/agsm/seed1/run/adapter",
        ),
        (
            lambda file: file["commands"][1]["sha256"].update({CAPTIONS: "d" * 64}),
            "seed1/coco has another (dddddddddddd",
        ),
    ],
)
def test_a_file_with_a_fault_does_not_pass(spoil, problem):
    content = a_file()
    spoil(content)
    assert any(problem in line for line in problems_of(json.dumps(content)))


def test_files_of_other_data_do_not_pass_together_and_one_of_mixed_data_gives_no_table(tmp_path, capsys):
    mine, yours = (tmp_path / name for name in ("mine.json", "yours.json"))
    mine.write_text(json.dumps(a_file()))
    yours.write_text(json.dumps(a_file()))
    run_reproduce(["check", str(mine), str(yours)])
    yours.write_text(json.dumps(a_file()).replace("c" * 64, "d" * 64))
    run_reproduce(["check", str(yours)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["check", str(mine), str(yours)])
    assert ended.value.code == 1
    assert f"{CAPTIONS}: sd15/agsm/seed0/coco of {yours} has another (dddddddddddd…)" in capsys.readouterr().out
    yours.write_text(json.dumps(a_file()).replace("c" * 64, "d" * 64, 1))
    for text, words in ((yours.read_text(), "do not belong in one table"), ("{}", "format: Field required")):
        yours.write_text(text)
        with pytest.raises(SystemExit) as ended:
            reproduce.main(["table", str(yours)])
        assert ended.value.code == 2 and words in capsys.readouterr().err


def test_coco_is_brought_into_the_form_that_the_recipes_read(tmp_path):
    coco, data = tmp_path / "coco", tmp_path / "data"
    (coco / "annotations").mkdir(parents=True)
    for split, numbers in {"train2017": (9, 2), "val2017": (7, 5)}.items():
        (coco / split).mkdir()
        for number in numbers:
            Image.new("RGB", (40, 30)).save(coco / split / f"{number}.jpg")
        images = [{"id": number, "file_name": f"{number}.jpg"} for number in numbers]
        notes = [{"image_id": number, "caption": f"{which} of\n{number} "} for number in numbers for which in "ab"]
        text = json.dumps({"images": images, "annotations": notes})
        (coco / "annotations" / f"captions_{split}.json").write_text(text)
    prepare(coco, data, side=16)
    rows = [json.loads(line) for line in (data / "coco_train2017" / "metadata.jsonl").read_text().splitlines()]
    assert rows[0] == {"file_name": "2.jpg", "caption": ["a of 2", "b of 2"]} and len(rows) == 2
    assert (data / "coco_val_captions.txt").read_text() == "a of 5\na of 7\n"
    assert [Image.open(file).size for file in sorted((data / "coco_val").iterdir())] == [(16, 16)] * 2
