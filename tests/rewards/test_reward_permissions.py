"""A recipe is data: it has a command run, or pictures sent away, only when the command line says so word for word."""

import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.registry import permissions

SCRIPT = """
from pathlib import Path
Path("it_ran").touch()
from agsm_rl_worker import serve
class Width:
    def __init__(self, *, times=1.0):
        self.times = times
    def __call__(self, images, prompts):
        return [self.times * images.shape[3]] * len(prompts)
serve(Width)
"""


@pytest.fixture
def recipe_with(tiny_checkpoint, tmp_path, monkeypatch):
    """A recipe's data, in a folder with a reward's script."""
    (tmp_path / "mine.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    def make(rewards):
        rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": rewards}
        rollouts |= {"num_prompts": 1, "images_per_prompt": 2, "num_steps": 2, "guidance": 1.0}
        return {
            "steps": 1,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": [{"use": "ddpo", "source": rollouts}],
            "track": [],
        }

    return make


def test_an_allowed_script_scores_a_run_and_only_when_it_is_asked(recipe_with):
    data = recipe_with({"worker": {"script": "./mine.py", "options": {"times": 0.5}, "weight": 2.0}})
    allowed = permissions(commands=["./mine.py"])
    recipe = Recipe.from_data(data, allow_imports=allowed)
    trainer = build_trainer(recipe)
    assert not Path("it_ran").exists()
    assert trainer.run_step()["ddpo/reward"] == 2.0 * 0.5 * 16
    assert Path("it_ran").exists()


JUDGE = {"url": "http://127.0.0.1:1/v1", "model": "m"}
KEY, REMOTE = {"api_key_env": "A_KEY"}, {"url": "http://x.example/v1"}
COMMAND = [sys.executable, "mine.py", "--quick run"]


@pytest.mark.parametrize(
    ("rewards", "allowed", "needed"),
    [
        ({"worker": {"script": "./mine.py"}}, {}, "--allow-command ./mine.py"),
        ({"worker": {"script": "./mine.py"}}, {"commands": ["mine.py"]}, "--allow-command ./mine.py"),
        ({"worker": {"script": "./mine.py"}}, {"imports": ["mine", "command"]}, "--allow-command ./mine.py"),
        ({"worker": {"command": COMMAND}}, {"commands": [sys.executable]}, "--allow-command"),
        ({"worker": {"command": COMMAND}}, {"commands": [f"{sys.executable} mine.py --quick run"]}, "--allow-command"),
        ({"http": {"url": "http://192.0.2.1:80/x"}}, {}, "--allow-host 192.0.2.1"),
        ({"http": {"url": "https://127.0.0.1.example"}}, {"hosts": ["example"]}, "--allow-host 127.0.0.1.example"),
        ({"ray_pool": {"reward": "worker", "options": {"script": "./mine.py"}}}, {}, "--allow-command ./mine.py"),
        ({"ray_pool": {"reward": "http", "options": {"url": "http://x.example"}}}, {}, "--allow-host x.example"),
        ({"ray_pool": {"reward": "shapes", "address": "ray://x.example:1"}}, {}, "--allow-host ray://x.example:1"),
        ({"vlm_judge": JUDGE | KEY}, {}, "environment variable A_KEY, which a recipe"),
        ({"vlm_judge": JUDGE | KEY}, {"hosts": ["127.0.0.1"], "imports": ["env"]}, "add --allow-env A_KEY to"),
        (
            {"vlm_judge": JUDGE | KEY | REMOTE},
            {},
            "x.example and sends the value of your environment variable A_KEY",
        ),
        ({"vlm_judge": JUDGE | KEY | REMOTE}, {}, "--allow-host x.example --allow-env A_KEY"),
        ({"vlm_judge": JUDGE | KEY | REMOTE}, {"hosts": ["x.example"], "variables": ["B_KEY"]}, "--allow-env A_KEY"),
        ({"ray_pool": {"reward": "vlm_judge", "options": JUDGE | KEY}}, {}, "--allow-env A_KEY"),
    ],
)
def test_without_permission_nothing_runs_and_the_message_says_what_to_add(recipe_with, rewards, allowed, needed):
    with pytest.raises(UserError, match="may not do by itself") as told:
        Recipe.from_data(recipe_with(rewards), allow_imports=permissions(**allowed))
    assert needed in str(told.value)
    assert not Path("it_ran").exists()


def test_loopback_and_registered_rewards_need_no_permission(recipe_with):
    for rewards in (
        {"http": {"url": "http://127.0.0.1:1"}},
        {"ray_pool": {"reward": "jpeg_compressibility"}},
        {"vlm_judge": JUDGE},
    ):
        read = Recipe.from_data(recipe_with(rewards)).to_data()
        assert set(read["objectives"][0]["source"]["rewards"]) == set(rewards)


@pytest.mark.parametrize("command", ["eval", "doctor"])
def test_other_commands_ask_for_the_same_leave_and_take_it(recipe_with, tiny_checkpoint, command):
    Path("prompts.txt").write_text("a red star\n")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_with({"worker": {"script": "mine.py"}})))
    call = {
        "eval": ["eval", str(tiny_checkpoint), "--suite", "rewards", "--prompts", "prompts.txt", "--num-steps", "1"],
        "doctor": ["doctor", "recipe.yaml"],
    }[command]
    call += ["--reward", "worker:script=mine.py"] if command == "eval" else []
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 2 and "--allow-command" in refused.stderr and not Path("it_ran").exists()
    CliRunner().invoke(app, [*call, "--allow-command", "mine.py"])
    assert Path("it_ran").exists()


def test_a_rewards_mistakes_are_told_with_their_place(recipe_with):
    with pytest.raises(UserError, match="rewards.worker.*give it a `script`, or a `command`"):
        Recipe.from_data(recipe_with({"worker": {}}))
    with pytest.raises(UserError, match=r"rewards.worker: .*'nowhere.py' does not exist"):
        Recipe.from_data(
            recipe_with({"worker": {"script": "nowhere.py"}}), allow_imports=permissions(commands=["nowhere.py"])
        )
    with pytest.raises(UserError, match="rewards.http.*is not a server's address"):
        Recipe.from_data(recipe_with({"http": {"url": "file:///etc/passwd"}}))
    with pytest.raises(UserError, match="timeout is in seconds and must be more than 0"):
        Recipe.from_data(
            recipe_with({"worker": {"script": "./mine.py", "timeout": 0}}),
            allow_imports=permissions(commands=["./mine.py"]),
        )


def test_the_command_line_takes_the_leave(recipe_with):
    Path("mine.yaml").write_text(yaml.safe_dump(recipe_with({"worker": {"script": "./mine.py"}})))
    refused = CliRunner().invoke(app, ["check", "mine.yaml"])
    assert refused.exit_code == 2 and "--allow-command ./mine.py" in refused.stderr
    assert CliRunner().invoke(app, ["check", "mine.yaml", "--allow-command", "./mine.py"]).exit_code == 0
    assert not Path("it_ran").exists()
    mixed = CliRunner().invoke(app, ["check", "mine.yaml", "--allow-import", "command:./mine.py"])
    assert mixed.exit_code == 2 and "give only the module" in mixed.stderr


def test_a_key_is_sent_with_leave_for_its_variable(recipe_with):
    Path("mine.yaml").write_text(yaml.safe_dump(recipe_with({"vlm_judge": JUDGE | KEY})))
    refused = CliRunner().invoke(app, ["check", "mine.yaml"])
    assert refused.exit_code == 2 and "--allow-env A_KEY" in refused.stderr
    assert CliRunner().invoke(app, ["check", "mine.yaml", "--allow-env", "A_KEY"]).exit_code == 0


@pytest.mark.parametrize("given", ["sk-proj-MYSECRET", "MYSECRET=", "MY SECRET", ""])
def test_a_key_in_the_place_of_its_variables_name_is_refused_and_not_shown(recipe_with, given):
    with pytest.raises(UserError, match="api_key_env: this is not the name of an environment variable") as told:
        Recipe.from_data(recipe_with({"vlm_judge": JUDGE | {"api_key_env": given}}))
    assert "SECRET" not in str(told.value)


@pytest.mark.parametrize("use", ["http", "vlm_judge"])
@pytest.mark.parametrize(
    "url",
    [
        "http://me:MYSECRET@x.example/v1",
        "http://MYSECRET@x.example/v1",
        "http://me:MYSECRET/1@x.example",
        "http://me%3AMYSECRET%40x.example",
        "me:MYSECRET@x.example",
        "http://x.example/v1?api_key=MYSECRET",
        "http://x.example/v1#MYSECRET",
        "http://x.exa\nmple/v1?key=MYSECRET",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_shown(recipe_with, use, url):
    options = {"url": url} | ({"model": "m"} if use == "vlm_judge" else {})
    with pytest.raises(UserError, match="•••") as told:
        Recipe.from_data(recipe_with({use: options}))
    assert "MYSECRET" not in str(told.value)
