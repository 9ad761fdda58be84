"""A run keeps to its folder, to a folder of its own, and to numbers that are finite."""

import os
import re
from io import StringIO

import pytest
import torch
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.recipe import Recipe
from agsm_rl.run import checkpoints, train
from agsm_rl.trainer import Callback
from agsm_rl.training.anomalies import WentWrong


@pytest.fixture
def recipe(tiny_checkpoint) -> Recipe:
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2, "num_images": 8}
    return Recipe.from_data(
        {
            "steps": 3,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": [{"use": "score_matching", "source": pairs}],
            "checkpoint": {"every": 1, "keep": 1},
            "sample": {"num_images": 1, "num_steps": 1},
            "track": [],
        }
    )


@pytest.fixture
def quiet() -> Console:
    return Console(file=StringIO())


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "samples", "logs", "metrics.jsonl", "eval.json"])
def test_a_link_out_of_the_run_folder_is_refused_and_nothing_outside_changes(recipe, quiet, tmp_path, name):
    outside = tmp_path / "outside"
    (outside / "checkpoints").mkdir(parents=True)
    (outside / "step-00000001.pt").write_text("mine")
    (outside / "file.jsonl").write_text("mine")
    run = train(recipe, tmp_path / "run", console=quiet, evaluate=False)
    place = run / name
    if place.is_dir():
        place.rename(run / f"moved-{name}")
    else:
        place.unlink(missing_ok=True)
    place.symlink_to(outside if "." not in name else outside / "file.jsonl")
    before = {path.name: path.read_text() for path in outside.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=re.escape(name)):
        train(recipe, run, resume=True, console=quiet, evaluate=False)
    assert {path.name: path.read_text() for path in outside.iterdir() if path.is_file()} == before


def test_a_named_pipe_in_a_run_folder_is_refused_without_waiting(recipe, quiet, tmp_path):
    run = train(recipe, tmp_path / "run", console=quiet, evaluate=False)
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl"):
        train(recipe, run, resume=True, console=quiet, evaluate=False)


IN_THE_WAY = {
    "adapter is a file": lambda run: (run / "adapter").write_text("mine"),
    "adapter is a link to nothing": lambda run: (run / "adapter").symlink_to("nowhere"),
    "an adapter's file is a folder": lambda run: (run / "adapter" / "pytorch_lora_weights.safetensors").mkdir(
        parents=True
    ),
    "checkpoints is a file": lambda run: (run / "checkpoints").write_text("mine"),
    "samples is a file": lambda run: (run / "samples").write_text("mine"),
    "eval.json is a folder": lambda run: (run / "eval.json").mkdir(),
    "report.html is a folder": lambda run: (run / "report.html").mkdir(),
    "metrics.jsonl is a folder": lambda run: (run / "metrics.jsonl").mkdir(),
}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_is_in_the_way_of_a_run_s_files_is_refused_before_the_first_step(recipe, quiet, tmp_path, case, resume):
    run = tmp_path / "run"
    run.mkdir()
    if resume:
        (run / "recipe.yaml").write_text(recipe.to_yaml())
    IN_THE_WAY[case](run)
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(UserError, match=r"this must be a f\w+, but it is"):
        train(recipe, run, resume=resume, console=quiet, evaluate=False)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_two_runs_started_in_the_same_second_get_different_folders(recipe, quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    first, second = (train(recipe, console=quiet, evaluate=False) for _ in range(2))
    assert first != second and first.is_dir() and second.is_dir()


@pytest.mark.parametrize("spoilt", ["parameter", "optimiser", "ema"])
def test_a_state_that_is_not_finite_is_neither_checkpointed_nor_exported(recipe, quiet, tmp_path, spoilt):
    class Spoil(Callback):
        def on_step(self, trainer, step, metrics):
            if step == 2:
                name, parameter = next(iter(trainer.parameters.items()))
                if spoilt == "parameter":
                    parameter.data.fill_(torch.nan)
                elif spoilt == "optimiser":
                    trainer.optimizer.state[parameter]["exp_avg"].fill_(torch.inf)
                else:
                    trainer.policy._shadow[name].fill_(torch.nan)

    with pytest.raises(WentWrong, match="not finite"):
        train(recipe, tmp_path / "run", console=quiet, callbacks=[Spoil()], evaluate=False)
    step, state = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert step == 1 and all(torch.isfinite(tensor).all() for tensor in state["policy"]["live"].values())


def test_user_code_that_calls_exit_does_not_look_like_a_finished_run(recipe, quiet, tmp_path):
    class Exits(Callback):
        def on_step(self, trainer, step, metrics):
            if step == 2:
                raise SystemExit(0)

    with pytest.raises(UserError, match=r"ended after step 2.*sys.exit.*step-00000001.pt"):
        train(recipe, tmp_path / "run", console=quiet, callbacks=[Exits()], evaluate=False)
