"""A full disk and folders that vanish: the newest good checkpoint is named, nothing is lost, nothing starts again."""

import resource
import shutil
from contextlib import contextmanager
from io import StringIO

import pytest
import torch
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run import checkpoints
from agsm_rl.run.lifecycle import train
from agsm_rl.trainer import Trainer


@contextmanager
def files_of_at_most(size: int):
    """As on a disk with so little room: writing on fails (EFBIG where a full disk says ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def make_recipe(tiny_checkpoint):
    def make(**changes) -> Recipe:
        pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2, "num_images": 8}
        content = {
            "steps": 3,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": [{"use": "score_matching", "source": pairs}],
            "checkpoint": {"every": 1, "keep": 1},
            "sample": {"num_images": 1, "num_steps": 1},
            "track": [],
        }
        return Recipe.from_data(content | changes)

    return make


@pytest.fixture
def quiet():
    return Console(file=StringIO())


def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one_and_names_it(tmp_path):
    checkpoints.save(tmp_path, 1, {"x": torch.ones(10)}, keep=1)
    with files_of_at_most(100_000), pytest.raises(UserError) as told:
        checkpoints.save(tmp_path, 2, {"x": torch.ones(100_000)}, keep=1)
    assert "step-00000002.pt: cannot be written (File too large)" in str(told.value)
    assert f"the newest good checkpoint is {tmp_path / 'step-00000001.pt'}" in str(told.value)
    assert checkpoints.newest(tmp_path)[0] == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_kill_between_checksum_and_checkpoint_of_the_same_step_loses_neither(tmp_path, monkeypatch):
    """A finished run that is resumed writes its last step again; with `keep: 1` that is the only checkpoint."""
    checkpoints.save(tmp_path, 1, {"x": 1}, keep=1)
    renamed = []

    def killed(self, target):
        renamed.append(target.name)
        if target.suffix == ".pt":
            raise KeyboardInterrupt
        return replace(self, target)

    replace = type(tmp_path).replace
    monkeypatch.setattr(type(tmp_path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, 1, {"x": 2}, keep=1)
    monkeypatch.undo()
    assert renamed == ["step-00000001.sha256", "step-00000001.pt"]
    assert checkpoints.newest(tmp_path) == (1, {"x": 1})
    checkpoints.save(tmp_path, 1, {"x": 2}, keep=1)
    assert checkpoints.newest(tmp_path) == (1, {"x": 2})


def test_a_run_on_a_full_disk_says_what_to_do_and_continues_when_there_is_room(make_recipe, tmp_path, quiet):
    run = tmp_path / "run"
    train(make_recipe(steps=1), run, console=quiet)
    with files_of_at_most(8_000), pytest.raises(UserError, match=r"cannot be written.*step-00000001.pt.*--resume"):
        train(make_recipe(), run, resume=True, console=quiet)
    train(make_recipe(), run, resume=True, console=quiet)
    assert checkpoints.newest(run / "checkpoints")[0] == 3
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_metrics_that_cannot_be_written_end_the_run_with_the_newest_checkpoint_named(make_recipe, tmp_path, quiet):
    run = tmp_path / "run"
    train(make_recipe(steps=1), run, console=quiet)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + " " * 12_000)
    with files_of_at_most(8_000), pytest.raises(UserError) as told:
        train(make_recipe(), run, resume=True, console=quiet)
    assert "step-00000001.pt" in str(told.value) and "--resume" in str(told.value)


def test_a_run_folder_that_vanishes_ends_the_run_and_is_not_recreated(make_recipe, tmp_path, quiet, monkeypatch):
    run, run_step = tmp_path / "run", Trainer.run_step

    def without_folder(trainer):
        if trainer.step == 1:
            shutil.rmtree(run)
        return run_step(trainer)

    monkeypatch.setattr(Trainer, "run_step", without_folder)
    with pytest.raises(UserError, match="ended after step 2: .*metrics.jsonl.*There is no checkpoint"):
        train(make_recipe(), run, console=quiet)
    assert not run.exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="no run in it to resume"):
        train(make_recipe(), run, resume=True, console=quiet)
    assert not run.exists()


def test_half_written_files_are_removed_when_a_killed_run_continues(make_recipe, tmp_path, quiet):
    run = tmp_path / "run"
    train(make_recipe(steps=1), run, console=quiet)
    good = sorted(path.name for path in run.rglob("*"))
    for name in (".recipe.yaml.7.new", "checkpoints/step-00000009.partial", "adapter/.tmpAbC", "adapter/.x.7.new"):
        (run / name).write_bytes(b"half")
    train(make_recipe(steps=1), run, resume=True, console=quiet)
    assert sorted(path.name for path in run.rglob("*")) == good


def test_a_new_run_whose_first_step_fails_removes_its_folder_but_no_other_files(
    make_recipe, tmp_path, quiet, monkeypatch
):
    def failing(trainer):
        raise UserError("no")

    monkeypatch.setattr(Trainer, "run_step", failing)
    with pytest.raises(UserError, match="no"):
        train(make_recipe(), tmp_path / "run", console=quiet)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    train(make_recipe(steps=1), tmp_path / "run", console=quiet)
    monkeypatch.setattr(Trainer, "run_step", failing)
    with pytest.raises(UserError, match="no"):
        train(make_recipe(), tmp_path / "run", resume=True, console=quiet)
    assert checkpoints.newest(tmp_path / "run" / "checkpoints")[0] == 1
