"""The command line: what each command gives, and that a mistake is one message and exit code 2."""

import hashlib
import json
import shutil
from importlib.metadata import version

import pytest
import torch
import yaml
from diffusers import AutoPipelineForText2Image
from typer.testing import CliRunner

from agsm_rl import attach
from agsm_rl.cli.commands import app
from agsm_rl.doctor.memory import fit
from agsm_rl.evaluate import suite
from agsm_rl.evaluate.drawing import to_picture, write_picture
from agsm_rl.registry import BUILTIN


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run `agsm-rl ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_told(result, *words):
    """Exit code 2 and one message on stderr that holds the words."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_the_versions_that_a_bug_report_needs_are_printed(command):
    result = command("--version")
    lines = result.output.splitlines()
    assert (result.exit_code, lines[0]) == (0, f"agsm-rl {version('agsm-rl')}")
    assert {f"{name} {version(name)}" for name in ("torch", "diffusers", "peft")} <= set(lines)


def test_check_tells_what_would_be_trained_and_the_memory(command, recipe, tmp_path):
    result = command("check", recipe)
    assert result.exit_code == 0, result.output
    for word in ("lora: lora", "tokens: soft_tokens", "agsm: agsm on pairs of builtin:shapes", "memory", "not counted"):
        assert word in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_check_names_the_view_that_a_term_sees_its_source_through_and_a_source_that_none_learns_from(command, recipe):
    own = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"shapes": 1.0}}
    term = {"use": "diffusion_dpo", "source": "own", "view": {"use": "best_against_worst"}}
    sources = {"own": own, "spare": own}
    content = yaml.safe_load(recipe.read_text()) | {"sources": sources, "objectives": [term]}
    recipe.write_text(yaml.safe_dump(content))
    result = command("check", recipe)
    assert result.exit_code == 0, result.output
    assert "diffusion_dpo on source 'own' through best_against_worst" in result.stdout
    said = {line.split()[1]: line for line in result.stdout.splitlines() if line.startswith("source ")}
    assert "no term learns from it" in said["spare:"] and "no term" not in said["own:"]


def test_train_then_sample_and_evaluate_the_run_and_its_adapter(command, recipe, tmp_path):
    trained = command("train", recipe, "--run-dir", "run")
    assert trained.exit_code == 0, trained.output
    drawn = command("sample", "run", "a red star", "-n", 2, "-o", "pictures", "--num-steps", 2)
    assert drawn.stdout.split() == ["pictures/seed-0.png", "pictures/seed-1.png", "pictures/grid.jpg"]
    again = command("sample", "run/adapter", "a red star", "-o", "again", "--num-steps", 2, "--guidance", 3)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again/seed-0.png").read_bytes() == (tmp_path / "pictures/seed-0.png").read_bytes()
    measured = command("eval", "run", "--num-images", 6, "--num-steps", 2, "--compare", "--json", "eval.json")
    assert measured.exit_code == 0, measured.output
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["num_images"] == found["base"]["num_images"] == 6
    exported = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (tmp_path / "run/adapter").glob("*.safetensors")
    }
    assert found["drawing"]["adapters"] == exported and found["drawing"]["num_steps"] == 2


def test_an_adapter_alone_is_drawn_with_on_the_base_that_it_was_trained_on(command, recipe, tmp_path, tiny_checkpoint):
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_checkpoint)
    for parameter in pipeline.unet.parameters():
        parameter.data *= 1.05
    pipeline.unet.save_pretrained(tmp_path / "other")
    assert command("train", recipe, "--run-dir", "run", "--set", "backbone.unet=other").exit_code == 0
    how = ("a red star", "--num-steps", 2, "--guidance", 3)
    asked = {"of_run": ["run"], "of_adapter": ["run/adapter"], "of_base": ["run/adapter", "--base", tiny_checkpoint]}
    for out, target in asked.items():
        assert command("sample", *target, *how, "-o", out).exit_code == 0
    drawn = [(tmp_path / out / "seed-0.png").read_bytes() for out in asked]
    assert drawn[0] == drawn[1] != drawn[2]


def test_images_of_two_targets_make_an_evaluation_that_a_report_takes(command, recipe, tmp_path, tiny_checkpoint):
    assert command("train", recipe, "--run-dir", "run").exit_code == 0
    how = ("--num-images", 12, "--num-steps", 2, "--guidance", 2)
    assert command("eval", tiny_checkpoint, *how, "--images", "base").exit_code == 0
    result = command("eval", "run", "--against", "base", "--images", "mine", "--json", "run/eval.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run/eval.json").read_text())["split"] == "held_out"
    assert command("report", "run").exit_code == 0


def test_images_are_drawn_so_many_at_a_time_as_is_said(command, tiny_checkpoint, monkeypatch):
    drawn = []

    def draw(backbone, prompts, seeds, **how):
        drawn.append(len(prompts))
        return torch.zeros(len(prompts), 3, 32, 32)

    monkeypatch.setattr(suite, "draw", draw)
    for given in ((), ("--batch-size", 2)):
        assert command("eval", tiny_checkpoint, "--num-images", 6, *given).exit_code == 0
    assert drawn == [6, 2, 2, 2]


def test_a_plain_pipeline_with_the_run_attached_draws_what_sample_draws(command, recipe, tmp_path, tiny_checkpoint):
    content = yaml.safe_load(recipe.read_text()) | {"optimizer": {"learning_rate": 0.1}}
    recipe.write_text(yaml.safe_dump(content))
    assert command("train", recipe, "--run-dir", "run").exit_code == 0
    drawn = command("sample", "run", "a red star", "--seed", 5, "-o", "out", "--num-steps", 2, "--guidance", 3)
    assert drawn.exit_code == 0, drawn.output
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_checkpoint)

    def picture(name):
        generator = torch.Generator().manual_seed(5)
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator, "output_type": "pt"}
        write_picture(to_picture(pipeline("a red star", **options).images[0]), tmp_path / name)
        return (tmp_path / name).read_bytes()

    base = picture("base.png")
    attach(pipeline, tmp_path / "run")
    assert picture("plain.png") == (tmp_path / "out" / "seed-5.png").read_bytes() != base


def test_a_run_is_continued_from_its_own_recipe(command, recipe):
    assert command("train", recipe, "--run-dir", "run").exit_code == 0
    result = command("train", "run/recipe.yaml", "--resume", "--set", "steps=3")
    assert (result.exit_code, result.stdout.strip()) == (0, "run folder: run")


def test_a_run_is_continued_by_its_folder(command, recipe):
    assert_told(command("train", ".", "--resume"), "folder without a run")
    assert command("train", recipe, "--run-dir", "run").exit_code == 0
    assert_told(command("train", "run"), "run: is a run's folder", "add --resume")
    assert_told(command("train", recipe, "--run-dir", "run"), "agsm-rl train run --resume")
    result = command("train", "run", "--resume", "--set", "steps=3")
    assert (result.exit_code, result.stdout.strip()) == (0, "run folder: run"), result.output


def test_a_run_cannot_be_continued_to_fewer_steps_than_it_has(command, recipe, tmp_path):
    assert command("train", recipe, "--run-dir", "run", "--set", "steps=2").exit_code == 0
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    assert_told(command("train", "run/recipe.yaml", "--resume", "--set", "steps=1"), "2 steps", "steps: 1")
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before


def test_list_gives_every_kind_as_json(command):
    found = json.loads(command("list", "--json").stdout)
    kinds = {"objectives", "rewards", "adapters", "sources", "views", "suites", "backbones", "recipes", "sweeps"}
    assert {"recipe", *kinds} <= set(found)
    assert {"agsm", "ddpo"} <= {row["name"] for row in found["objectives"]}
    assert set(json.loads(command("list", "rewards", "--json").stdout)) == {"rewards"}
    names = {kind: [row["name"] for row in found[kind]] for kind in ("recipes", "sweeps")}
    assert "builtin:agsm" in names["recipes"] and "builtin:study/smoke" in names["sweeps"]
    assert not set(names["recipes"]) & set(names["sweeps"])


def test_list_says_in_a_line_what_each_name_is_and_explains_the_recipe_s_blocks(command):
    for rows in json.loads(command("list", "--json").stdout).values():
        assert all(row["about"] for row in rows)
    assert "ddpo" in command("list", "objectives").stdout and "DDPO on rollouts." in command("list").stdout
    told = command("list", "sample").stdout
    assert "every: int = 100" in told and "Draw a grid every this many steps" in told
    keys = json.loads(command("list", "term", "--json").stdout)["term"]["options"]
    assert {"weight", "every", "trains"} <= {key["name"] for key in keys} and all(key["meaning"] for key in keys)


def test_an_option_that_is_a_key_of_the_recipe_is_answered_by_set(command, recipe):
    for name, given in {"train": ["--steps", "2"], "check": ["--steps=2"]}.items():
        told = command(name, recipe, *given)
        assert told.exit_code == 2 and "--set steps=2" in " ".join(told.stderr.replace("│", "").split())
    told = command("train", recipe, "--learning-rate", "1e-4")
    assert "--set optimizer.learning_rate=1e-4" in " ".join(told.stderr.replace("│", "").split())
    assert "--set" not in command("sample", "x", "y", "--steps", "2").stderr


def test_quiet_prints_the_run_folder_alone(command, recipe):
    result = command("train", recipe, "--run-dir", "run", "--set", "steps=1", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "run folder: run\n", "")


def test_help_has_a_short_name_and_completion_can_be_installed(command):
    assert "Usage: " in command("-h").stdout and "--install-completion" in command("-h").stdout
    assert command("train", "-h").stdout == command("train", "--help").stdout


def test_check_proposes_what_fits(command, recipe, monkeypatch):
    monkeypatch.setattr(fit, "STEPS", fit.STEPS[:1])
    small = command("check", recipe, "--fit-vram", 0.001)
    assert small.exit_code == 1 and "does not fit 1.024 MiB" in small.stdout
    large = command("check", recipe, "--fit-vram", 4)
    assert large.exit_code == 0 and "fits 4 GiB as it is" in large.stdout


@pytest.mark.parametrize("harm", ["gone", "cut off"])
def test_check_sees_weights_that_are_not_whole(command, recipe, tiny_checkpoint, tmp_path, harm):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()[:-1000]
    weights.unlink() if harm == "gone" else weights.write_bytes(kept)
    result = command("check", recipe, "--set", f"backbone.checkpoint={base}")
    assert result.exit_code == 2 and "backbone.checkpoint" in result.stderr and str(base) in result.stderr


@pytest.mark.parametrize("place", ["sample", "evaluate.suites.mine"])
def test_check_refuses_prompts_that_train_would_refuse(command, recipe, tmp_path, place):
    (tmp_path / "prompts.csv").write_text("words\na red star\n")
    suite = {"use": "rewards", "rewards": ["sharpness"], "prompts": "prompts.csv"}
    section = {"sample": {"prompts": "prompts.csv"}, "evaluate.suites.mine": {"suites": {"mine": suite}}}[place]
    recipe.write_text(recipe.read_text() + yaml.safe_dump({place.partition(".")[0]: section}))
    assert_told(command("check", recipe), "prompts.csv")
    assert command("check", recipe, "--set", f"{place}.prompt_column=words").exit_code == 0


def test_options_of_the_base_count_for_a_run_too_but_not_which_base_it_is(command, recipe):
    assert command("train", recipe, "--run-dir", "run").exit_code == 0
    small = ("--suite", "shapes", "--num-images", 2, "--num-steps", 2)
    wrong = command("eval", "run", *small, "--backbone", "attention=nonsense")
    assert wrong.exit_code == 2 and "nonsense" in wrong.stderr
    for key in ("checkpoint", "use"):
        assert_told(command("eval", "run", *small, "--backbone", f"{key}=x"), f"--backbone {key}", "--base")


def test_world_writes_an_image_folder(command, tmp_path):
    assert command("world", "out", "--num-images", 3).exit_code == 0
    assert len((tmp_path / "out/metadata.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objectives.0.use=agms", ["mine.yaml", "objectives[0].use", "Did you mean 'agsm'?"]),
        ("backbone.checkpoint=builtin:shapes-sd99", ["mine.yaml", "builtin:shapes-sd99"]),
        ("objectives.0.source.dataset=./nowhere", ["objectives[0].source.dataset", "./nowhere"]),
        ("objectives.0.source.batch_size=5", ["batch_size 5", "group_size 4"]),
        ("objectives.0.use=os:system", ["--allow-import os"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "'fast'"]),
    ],
)
def test_a_wrong_recipe_ends_with_one_message_and_no_run_folder(command, recipe, tmp_path, override, words):
    assert_told(command("train", recipe, "--run-dir", "run", "--set", override), *words)
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_told(command):
    assert_told(command("train", "nowhere.yaml"), "nowhere.yaml", "no such recipe")
    assert_told(command("check", "builtin:nowhere"), "builtin:nowhere", "not a shipped recipe")


def test_resume_without_a_run_is_told(command, recipe):
    assert_told(command("train", recipe, "--resume"), "--resume", "does not belong to a run", "give the run's folder")


def test_a_run_folder_in_use_is_told(command, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert_told(command("train", recipe, "--run-dir", "run"), "run", "not empty")
    assert_told(command("train", recipe, "--run-dir", "run", "--resume"), "not a run folder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_wrong_targets_suites_and_kinds_are_told(command, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_told(command("sample", "empty", "a red star"), "empty", ".safetensors")
    assert_told(command("sample", "nowhere.safetensors", "a red star"), "nowhere.safetensors")
    assert_told(command("sample", "builtin:nothing", "a red star"), "builtin:nothing")
    assert_told(command("eval", "empty", "--suite", "shape"), "--suite", "Did you mean 'shapes'?")
    assert_told(command("list", "objectivs"), "Did you mean 'objectives'?")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("steps: 1", "backbone: this key is required, but it is missing. Write e.g. `backbone: {use: "),
        ("backbone:", "backbone: this key is required, but it is empty (null). Write e.g. `backbone: {use: "),
        ("backbone: {use: 3}", "backbone.use: got 3"),
        ("backbone: {use: stable_diffusion, checkpoint: x}\nsample: {guidance: high}", "sample.guidance: got 'high'"),
    ],
)
def test_a_run_whose_recipe_was_damaged_is_told(command, tmp_path, text, word):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(text)
    assert_told(command("sample", "run", "a red star"), "run/recipe.yaml", word)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drawn(command, tmp_path):
    (tmp_path / "file").write_text("x")
    assert_told(
        command("sample", "nowhere", "a red star", "-o", "file/x"), "-o file/x", "file is a file; give a folder"
    )
    assert_told(command("world", "file/x"), "Not a directory", "file/x")


def test_guidance_is_finite(command):
    assert_told(command("sample", "nowhere", "a red star", "--guidance", "nan"), "--guidance", "nan")


def test_a_truncated_adapter_is_told(command, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\x00\x00")
    assert_told(command("sample", "broken.safetensors", "a red star", "--base", "x"), "broken.safetensors", "truncated")


def test_a_misspelt_run_folder_is_not_taken_for_a_base_alone(command, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("sample", "eval"):
        arguments = ["a red star"] if name == "sample" else ["--suite", "shapes"]
        assert_told(command(name, "runs/gone", *arguments), "TARGET 'runs/gone'", "no such", "give a run folder")


def test_list_tells_what_a_name_means_and_its_options(command):
    told = command("list", "agsm").stdout
    assert "Published: 4 groups of 4" in told
    assert "temperature: float = 0.1" in told and "groups_per_pass: int or null = null" in told
    options = {
        option["name"]: option
        for option in json.loads(command("list", "rollouts", "--json").stdout)["sources"]["options"]
    }
    assert options["eta"].pop("meaning").startswith("Noise of `ddim` steps")
    assert options["eta"] == {"name": "eta", "type": "float", "default": "1.0"}
    assert "default" not in options["prompts"]
    lora = json.loads(command("list", "lora", "--json").stdout)["adapters"]
    seed = next(option for option in lora["options"] if option["name"] == "seed")
    assert (seed["type"], seed["default"]) == ("int or null", "null")  # null: the recipe's
    assert_told(command("list", "agsmm"), "Did you mean 'agsm'?")


def test_a_reward_that_is_a_function_is_listed_without_options(command, tmp_path, monkeypatch):
    (tmp_path / "plain_reward.py").write_text(
        'def ones(images, prompts):\n    """Always 1."""\n    return [1.0] * len(prompts)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BUILTIN["rewards"], "ones", "plain_reward:ones")
    assert command("list", "ones").stdout.split() == ["rewards:", "ones", "Always", "1.", "options:", "none"]
    assert json.loads(command("list", "ones", "--json").stdout)["rewards"]["options"] == []


def test_every_listed_name_stands_apart_from_what_it_names(command):
    names = {row["name"] for rows in json.loads(command("list", "--json").stdout).values() for row in rows}
    rows = [line for line in command("list").stdout.splitlines() if line.startswith("  ")]
    assert {row.split()[0] for row in rows} == names


@pytest.mark.parametrize("kind", ["objectives", "rewards", "adapters", "sources", "views", "backbones"])
def test_every_option_of_what_is_shipped_is_explained(command, kind):
    for row in json.loads(command("list", kind, "--json").stdout)[kind]:
        found = json.loads(command("list", row["name"], "--json").stdout)[kind]
        silent = [option["name"] for option in found["options"] if not option["meaning"]]
        assert found["about"] and not silent, row["name"]


def test_what_is_not_there_and_what_cannot_be_made_are_named(command):
    assert_told(command("convert", "nope", "x.safetensors"), "IN 'nope'", "no such file or folder")
    assert_told(command("world", "/proc/w"), "DIR /proc/w", "give another place")
