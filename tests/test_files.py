"""Paths: the home folder, what only the hub can have, and no waiting for a hub that does not answer."""

import socket
import time

import pytest
import yaml
from typer.testing import CliRunner

from agsm_rl import files
from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.files import local_or_hub, local_path


def look(name):
    return local_or_hub(name, where="dataset", allowed="another")


def test_the_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    assert local_path("~/photos") == look("~/photos") == tmp_path / "photos"
    assert str(local_path("a/~/b")) == "a/~/b"
    with pytest.raises(UserError, match="home folder of ~nobody-of-this-name is not known"):
        local_path("~nobody-of-this-name/photos")


@pytest.mark.parametrize("name", ["a [1] *b?", "white space/x", "photos"])
def test_what_is_here_is_taken_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert look(name).is_dir()


@pytest.mark.parametrize(
    "name",
    ["photos", "./a/b", "/no/such", "a/b/c", "a/b.parquet", "here/gone", "~/gone", "a b/c", "x" * 5000, "a\0b/c"],
)
def test_a_missing_path_is_refused_without_asking_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match="there is no such file or folder.*; give another"):
        look(name)


def test_only_owner_and_name_can_be_the_hub_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert look("owner/name-of.it") is None


def test_a_hub_that_cannot_be_reached_is_noticed_at_once(monkeypatch):
    from datasets import load_dataset
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        files.hub_answers.cache_clear()
        started = time.monotonic()
        with files.cache_where_unreachable("owner/name"), pytest.raises(ConnectionError):
            load_dataset("owner/name")
        assert time.monotonic() - started < files.HUB_SECONDS
        assert "the hub cannot be reached" in files.why_not_on_hub("owner/name")
    files.hub_answers.cache_clear()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and an empty folder to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_tilde_is_the_home_folder_in_a_recipe_in_set_and_in_options(home, tiny_checkpoint):
    (home / "base").symlink_to(tiny_checkpoint)
    (home / "words.txt").write_text("dark\nbright\n")
    rewards = {"brightness": 1.0}
    source = {"use": "rollouts", "prompts": "~/words.txt", "rewards": rewards, "num_prompts": 2, "images_per_prompt": 2}
    recipe = {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": "~/nowhere", "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "objectives": [{"use": "ddpo", "source": source | {"num_steps": 2, "guidance": 1.0}}],
        "sample": {"num_images": 1, "num_steps": 1},
        "track": [],
    }
    (home / "x.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--run-dir=~/run", "--set", "backbone.checkpoint=~/base"]
    result = CliRunner().invoke(app, ["train", "~/x.yaml", *options])
    assert result.exit_code == 0, result.output
    again = [*options[1:], "--set", "start_from=~/run", "--run-dir=~/again"]
    result = CliRunner().invoke(app, ["train", "~/x.yaml", *again])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["sample", "~/run", "~/not a path", "-o", "~/drawn", "--num-steps", "1"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["report", "~/run", "~/again", "-o", "~/page.html"])
    assert result.exit_code == 0, result.output
    assert {"run", "again", "drawn", "page.html"} <= {path.name for path in home.iterdir()}
    assert not list((home.parent / "work").iterdir())
