"""`agsm-rl init` writes recipes that can be trained, asks for what is missing, and overwrites nothing."""

import pytest
import yaml
from typer.testing import CliRunner

from agsm_rl.cli import asking
from agsm_rl.cli.commands import app
from agsm_rl.recipe import Recipe
from agsm_rl.recipe.starter import FROM_IMAGES, FROM_REWARDS, VIEWS, Wishes, starter_recipe


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run `agsm-rl ...` in a folder with a list of prompts and a reward."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text('a red star\n"a" blue: circle\ntwo green squares\n')
    (tmp_path / "taste_of_mine.py").write_text("def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    return lambda *given, answers="": CliRunner().invoke(app, list(map(str, given)), input=answers)


def assert_refused(result, *words):
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_a_written_recipe_is_checked_and_trained(command, tiny_checkpoint, tmp_path):
    how = ("--prompts", "prompts.txt", "--reward", "taste_of_mine:bright", "--reward", "sharpness")
    written = command("init", "--checkpoint", tiny_checkpoint, *how, "-o", "mine.yaml")
    assert written.exit_code == 0, written.output
    assert "agsm-rl check mine.yaml --allow-import taste_of_mine" in written.stdout
    allow = ("--allow-import", "taste_of_mine")
    checked = command("check", "mine.yaml", *allow)
    assert checked.exit_code == 0 and "mine.yaml: ok" in checked.stdout, checked.output
    small = {"steps": 2, "sources.own_images.images_per_prompt": 2, "sources.own_images.num_steps": 2, "track": "[]"}
    small |= {"sample.num_images": 2, "sample.num_steps": 2, "evaluate.every": "null"}
    small |= {"evaluate.suites.mine.num_images": 2, "evaluate.num_steps": 2}
    changes = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    trained = command("train", "mine.yaml", *allow, *changes, "--run-dir", "run")
    assert trained.exit_code == 0, trained.output
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_the_defaults_are_accepted_and_nothing_is_overwritten(command, tmp_path):
    assert command("init", "--yes").exit_code == 0
    before = (tmp_path / "recipe.yaml").read_text()
    Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert_refused(command("init", "--yes"), "-o recipe.yaml", "exists, and is not overwritten")
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_the_next_commands_can_be_pasted_whatever_the_files_name(command, tmp_path):
    written = command("init", "--yes", "-o", "my first recipe.yaml")
    assert "agsm-rl check 'my first recipe.yaml'" in written.stdout
    comments = (tmp_path / "my first recipe.yaml").read_text().splitlines()
    for name in ("check", "train"):
        assert any(f"agsm-rl {name} 'my first recipe.yaml'" in line for line in comments)


def test_a_draw_has_no_more_prompts_than_the_list(command, tmp_path):
    assert command("init", "--prompts", "prompts.txt", "--reward", "sharpness", "--yes").exit_code == 0
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").sources["own_images"].options["num_prompts"] == 3


@pytest.mark.parametrize("objective", sorted({*FROM_IMAGES, *FROM_REWARDS, *VIEWS}))
def test_each_objective_that_can_be_asked_for_gives_a_recipe_that_is_accepted(objective, tmp_path):
    from_images = Wishes("builtin:shapes-sd3", images="builtin:shapes", objectives=(objective,))
    from_rewards = Wishes("a/b", prompts="builtin:shapes-prompts", rewards=("sharpness",), objectives=(objective,))
    possible = [from_images] if objective in FROM_IMAGES else []
    possible += [from_rewards] if objective in (*FROM_REWARDS, *VIEWS) else []
    for wishes in possible:
        recipe = Recipe.from_data(yaml.safe_load(starter_recipe(wishes, tmp_path / "x.yaml")))
        assert [term.use for term in recipe.objectives] == [objective]


def test_questions_are_asked_again_where_an_answer_cannot_be_used(command, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "is_terminal", lambda: True)
    answers = [
        "nowhere.safetensors",
        tiny_checkpoint,
        "rewards",
        "gone.txt",
        "prompts.txt",
        "shapez",
        "sharpness,brightness",
        "",
    ]
    asked = command("init", answers="".join(f"{answer}\n" for answer in answers))
    assert asked.exit_code == 0, asked.output
    for word in ("no such file or folder", "'shapez' is not a reward", "Did you mean 'shapes'?"):
        assert word in asked.stdout
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.backbone.options["checkpoint"] == str(tiny_checkpoint)
    assert list(recipe.sources["own_images"].options["rewards"]) == ["sharpness", "brightness"]
    assert recipe.objectives[0].use == "ddpo" and recipe.sample.prompts == "prompts.txt"


def test_a_reward_that_needs_an_option_is_measured_with_it_too(tmp_path):
    wishes = Wishes("builtin:shapes-sd15", prompts="builtin:shapes-prompts", rewards=("hpsv2",))
    data = yaml.safe_load(starter_recipe(wishes, tmp_path / "x.yaml"))  # its weights are not here, so it is not made
    assert data["evaluate"]["rewards"] == {"hpsv2": {"version": "2.1"}}


def test_a_recipe_for_a_model_of_ones_own_is_made_for_a_gpu_and_draws_alike_everywhere(tmp_path):
    wishes = Wishes("owner/sdxl", prompts="prompts.txt", rewards=("sharpness",))
    recipe = yaml.safe_load(starter_recipe(wishes, tmp_path / "x.yaml"))
    assert (recipe["backbone"]["dtype"], recipe["backbone"]["gradient_checkpointing"]) == ("bfloat16", True)
    draws = recipe["sources"]["own_images"]
    assert draws["guidance"] == recipe["sample"]["guidance"] == recipe["evaluate"]["guidance"]
    assert draws["sample_batch_size"] == recipe["objectives"][0]["images_per_pass"]
    assert recipe["optimizer"]["learning_rate"] == 3e-4


def test_a_held_out_reward_is_measured_where_the_model_learns_from_images_too(tmp_path):
    wishes = Wishes("owner/base", images="owner/photos", held_out=("sharpness",))
    recipe = Recipe.from_data(yaml.safe_load(starter_recipe(wishes, tmp_path / "x.yaml")))
    suite = recipe.evaluate.suites["mine"]
    assert suite.options["prompts"] == "owner/photos" and list(suite.rewards) == ["sharpness"]


def test_an_sd3_learns_by_flow_grpo(command, tiny_sd3_checkpoint, tmp_path):
    how = ("--prompts", "prompts.txt", "--reward", "sharpness")
    assert command("init", "--checkpoint", tiny_sd3_checkpoint, *how).exit_code == 0
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").objectives[0].use == "flow_grpo"


def test_what_cannot_be_made_into_a_recipe_is_refused_and_writes_nothing(command, tmp_path):
    assert_refused(command("init"), "no terminal", "--yes")
    assert_refused(command("init", "--checkpoint", "./gone", "--yes"), "--checkpoint './gone'")
    assert_refused(command("init", "--prompts", "gone.txt", "--yes"), "--prompts 'gone.txt'")
    assert_refused(command("init", "--reward", "sharpnes", "--yes"), "--reward", "Did you mean 'sharpness'?")
    assert_refused(command("init", "--held-out", "sharpnes", "--yes"), "--held-out: 'sharpnes'")
    assert_refused(command("init", "--images", "builtin:shapes", "--objective", "ddpo", "--yes"), "add --prompts")
    gone = command("init", "--reward", "taste_of_mine:gone", "--yes")  # learned from, and measured
    assert gone.exit_code == 2 and gone.stderr.count("taste_of_mine has no 'gone'") == 2
    assert_refused(command("init", "--yes", "-o", "no/such/x.yaml"), "there is no folder")
    assert not list(tmp_path.glob("*.yaml"))


def written(checkpoint, tmp_path, **wishes):
    return Recipe.from_data(yaml.safe_load(starter_recipe(Wishes(checkpoint, **wishes), tmp_path / "x.yaml")))


@pytest.mark.parametrize(
    ("checkpoint", "guidance", "num_steps"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 5.0, 30),
        ("stabilityai/stable-diffusion-3.5-medium", 4.0, 28),
        ("black-forest-labs/FLUX.1-dev", 1.0, 28),
        ("black-forest-labs/FLUX.1-schnell", 1.0, 4),
        ("black-forest-labs/FLUX.2-klein-4B", 1.0, 4),
        ("black-forest-labs/FLUX.2-klein-base-4B", 4.0, 50),
        ("Tongyi-MAI/Z-Image-Turbo", 1.0, 8),
        ("Tongyi-MAI/Z-Image", 5.0, 50),
    ],
)
def test_a_model_is_drawn_with_its_own_guidance_and_steps(checkpoint, guidance, num_steps, tmp_path):
    recipe = written(checkpoint, tmp_path, prompts="builtin:shapes-prompts", rewards=("sharpness",))
    drawn = recipe.sources["own_images"].options
    assert (recipe.evaluate.guidance, recipe.sample.guidance, drawn["guidance"]) == ([guidance], [guidance], guidance)
    assert recipe.evaluate.num_steps == recipe.sample.num_steps == num_steps
    assert drawn["num_steps"] == min(num_steps, 10 if recipe.objectives[0].use == "flow_grpo" else 20)


def test_agsm_has_a_second_bank_and_an_ema_that_a_short_run_moves(tmp_path):
    for checkpoint, gamma in {"builtin:shapes-sd15": 1.0, "builtin:shapes-sd3": 0.1}.items():
        recipe = written(checkpoint, tmp_path, images="builtin:shapes")
        assert recipe.adapters["lora"].options["banks"] == 2 and recipe.ema.decay == 0.99
        assert recipe.objectives[0].options["gamma_negative"] == gamma


def test_flow_grpo_and_nft_have_their_authors_advantages_kl_and_old_policy(tmp_path):
    how = {"prompts": "builtin:shapes-prompts", "rewards": ("sharpness",)}
    recipe = written("builtin:shapes-sd3", tmp_path, **how)
    assert recipe.objectives[0].use == "flow_grpo" and recipe.objectives[0].options["kl"] == "published"
    assert recipe.sources["own_images"].options["advantages"] == {"by": "group", "std": "global"}
    of_unet = written("builtin:shapes-sd15", tmp_path, **how, objectives=("flow_grpo",))
    assert of_unet.objectives[0].options["kl"] == "exact"  # the published one is for flow models' noise
    recipe = written("builtin:shapes-sd3", tmp_path, **how, objectives=("diffusion_nft",))
    drawn = recipe.sources["own_images"].options
    assert (drawn["drawn_by"], drawn["eta"], drawn["guidance"]) == ("old", 0.0, 1.0)
    assert recipe.objectives[0].options["old"] == {"decay": {"0": 0.0, "500": 0.5}, "every": "draw"}
