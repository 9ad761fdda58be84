"""Paths: the home folder, what only the hub can have, and no waiting for a hub that does not answer."""

import socket
import time

import pytest

from agsm_rl import files
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
        with files.cache_where_unreachable(), pytest.raises(ConnectionError):
            load_dataset("owner/name")
        assert time.monotonic() - started < files.HUB_SECONDS
        assert "the hub cannot be reached" in files.why_not_on_hub("owner/name")
    files.hub_answers.cache_clear()
