"""An evaluation's prompt suffix: images are drawn with it, judged without it, and it is reported."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from agsm_rl.backbones import load_backbone
from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import PINNED, DrawingSettings, Share, draw_images, image_of, plan
from agsm_rl.evaluate.drawing import draw, to_picture
from agsm_rl.evaluate.image_folder import open_picture
from agsm_rl.evaluate.measured import measure, to_json
from agsm_rl.evaluate.suites.shapes import Shapes, suite_prompts
from agsm_rl.evaluate.target import open_target
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.earlier import evaluation_of_today
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.evaluation import Evaluator
from agsm_rl.run.folder import RunFolder
from agsm_rl.sweep.plan import make_plan

SUFFIX = ", verified"


def draw_into(folder, prompts, num_images, target, how):
    wanted = [image_of(folder, item) for item in plan(prompts, num_images)]
    draw_images(Shapes(), wanted, folder, target, how, Share())


def test_a_recipe_s_evaluation_draws_base_and_trained_with_it_and_judges_by_the_prompt(tiny_checkpoint, tmp_path):
    source = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 8}
    recipe = Recipe.from_data(
        {
            "steps": 1,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": [{"use": "score_matching", "source": source}],
            "evaluate": {"num_images": 3, "num_steps": 2, "rewards": ["shapes"], "prompt_suffix": SUFFIX},
            "track": [],
        }
    )
    trainer = build_trainer(recipe)
    watching = Evaluator(RunFolder(tmp_path), recipe, Console(file=StringIO()))
    suites = watching.measure(trainer)
    ((base, trained),) = suites["shapes"]
    prompts = suite_prompts("held_out", 3, 0)
    read = [prompt + SUFFIX for prompt in prompts]
    wanted = draw(trainer.policy.backbone, read, [0, 1, 2], guidance=3.0, num_steps=2)
    # An adapter that has not learned yet changes nothing.
    wanted = {row: to_picture(image) for row, image in enumerate(wanted)}
    assert base.pictures == wanted and trained.pictures == wanted
    plain = measure(trainer.policy.backbone, watching.entries[0], Evaluate(num_images=3, num_steps=2), 3.0)
    assert plain.pictures != wanted
    assert [row.prompt for row in trained.result.verdicts] == prompts and "shapes" in trained.rewards
    assert to_json(suites, recipe.evaluate)["prompt_suffix"] == SUFFIX


def test_settings_stored_before_there_was_one_mean_none():
    settings = Evaluate().model_dump(mode="json")
    assert settings.pop("prompt_suffix") == ""
    parts = Parts(where="recipe.yaml")
    assert evaluation_of_today(settings, parts) == evaluation_of_today(settings | {"prompt_suffix": ""}, parts)
    assert evaluation_of_today(settings | {"prompt_suffix": SUFFIX}, parts).prompt_suffix == SUFFIX


def test_a_folder_of_images_is_drawn_with_it_and_not_gone_on_with_under_another(tiny_checkpoint, tmp_path):
    target = open_target(str(tiny_checkpoint), options={"device": "cpu"})
    asked, folders = {0: {"prompt": "a red star"}}, {"behind": SUFFIX, "plain": ""}
    for name, suffix in folders.items():
        how = DrawingSettings(num_steps=2, prompt_suffix=suffix)
        draw_into(tmp_path / name, asked, 1, target, how)
    whole = {0: {"prompt": "a red star" + SUFFIX}}
    draw_into(tmp_path / "whole", whole, 1, target, DrawingSettings(num_steps=2))
    behind, plain, wanted = (
        open_picture(tmp_path / name / "00000/samples/0000.png").tobytes() for name in ("behind", "plain", "whole")
    )
    assert behind == wanted != plain
    assert json.loads((tmp_path / "behind/00000/metadata.jsonl").read_text()) == asked[0]
    # A folder from before there were suffixes is one without.
    file = tmp_path / "plain" / PINNED
    settings = json.loads(file.read_text())
    assert settings.pop("prompt_suffix") == ""
    file.write_text(json.dumps(settings))
    draw_into(tmp_path / "plain", asked, 2, target, DrawingSettings(num_steps=2))
    for name, other in (("behind", ""), ("plain", SUFFIX)):
        how = DrawingSettings(num_steps=2, prompt_suffix=other)
        with pytest.raises(UserError, match="drawn with prompt_suffix"):
            draw_into(tmp_path / name, asked, 1, target, how)


def test_eval_takes_it_on_the_command_line(tiny_checkpoint, tmp_path):
    kept = {}
    for name, options in {"kept": ["--images", str(tmp_path / "im")], "not_kept": []}.items():
        how = ["--num-images", "2", "--num-steps", "2", "--json", str(tmp_path / f"{name}.json")]
        done = CliRunner().invoke(app, ["eval", str(tiny_checkpoint), *how, "--prompt-suffix", SUFFIX, *options])
        assert done.exit_code == 0, done.output
        kept[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert kept["kept"]["drawing"]["prompt_suffix"] == kept["not_kept"]["prompt_suffix"] == SUFFIX
    picture = draw(
        load_backbone(str(tiny_checkpoint)),
        [suite_prompts("held_out", 2, 0)[0] + SUFFIX],
        [0],
        guidance=kept["kept"]["drawing"]["guidance"],
        num_steps=2,
    )[0]
    first = open_picture(next(iter(sorted((tmp_path / "im").rglob("*.png")))))
    assert abs(torch.tensor(list(first.getdata())) - 255 * picture.flatten(1).T).max() <= 1


def test_images_that_are_drawn_already_and_cells_of_a_sweep_are_given_none(tiny_checkpoint, tmp_path, capsys):
    target = open_target(str(tiny_checkpoint), options={"device": "cpu"})
    draw_into(tmp_path / "im", {0: {"prompt": "a red star"}}, 1, target, DrawingSettings())
    with pytest.raises(SystemExit, match="2"):
        app(["eval", str(tmp_path / "im"), "--prompt-suffix", SUFFIX])
    assert "im is already drawn; leave the option out" in capsys.readouterr().err
    (tmp_path / "s.yaml").write_text(f"recipe: builtin:agsm\naxes: {{evaluate.prompt_suffix: ['', '{SUFFIX}']}}\n")
    with pytest.raises(UserError, match="all cells are evaluated in the same way"):
        make_plan(str(tmp_path / "s.yaml"), folder=tmp_path)
