"""Run folders: what a run leaves behind, how it is continued, and when it is refused."""

import json
import os
import signal
from io import StringIO

import pytest
from filelock import FileLock
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.recipe import Recipe
from agsm_rl.run import train
from agsm_rl.run_folder import MetricsFile
from agsm_rl.stop import Stopped
from agsm_rl.trainer import Trainer


@pytest.fixture
def make_recipe(tiny_checkpoint):
    """AGSM over LoRA on the tiny base."""

    def make(**changes) -> Recipe:
        pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 16}
        content = {
            "steps": 4,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2, "banks": 2}},
            "objectives": [{"use": "agsm", "source": pairs}],
            "checkpoint": {"every": 2},
            "sample": {"every": 2, "num_images": 2, "num_steps": 2, "prompts": ["a red star"]},
            "track": [],
        }
        return Recipe.from_data(content | changes)

    return make


@pytest.fixture
def quiet():
    return Console(file=StringIO())


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_all_that_the_contract_names(make_recipe, tmp_path, quiet):
    evaluation = {"every": 2, "num_images": 6, "num_steps": 2, "guidance": [1.0, 3.0], "rewards": ["shapes"]}
    recipe = make_recipe(evaluate=evaluation, track=["tensorboard"])
    folder = train(recipe, tmp_path / "run", console=quiet)
    assert Recipe.from_yaml(folder / "recipe.yaml") == recipe
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "agsm/loss", "agsm/grad_norm"} <= set(rows[0])
    assert (folder / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "before_after.png",
        "step-00000002.png",
        "step-00000004.png",
    ]
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    measured = json.loads((folder / "eval.json").read_text())
    assert {"suite", "num_images", "overall", "tags", "strict", "base", "difference"} <= set(measured)
    assert (measured["guidance"], measured["other_guidances"][0]["guidance"], measured["step"]) == (1.0, 3.0, 4)
    assert set(next(iter(measured["tags"].values()))) == {"correct", "total", "score", "low", "high"}


def test_a_second_run_in_the_same_folder_is_refused(make_recipe, tmp_path, quiet):
    train(make_recipe(steps=1), tmp_path / "run", console=quiet)
    with pytest.raises(UserError, match="is not empty.*--resume"):
        train(make_recipe(steps=1), tmp_path / "run", console=quiet)


def test_a_folder_that_another_process_trains_in_is_refused(make_recipe, tmp_path, quiet):
    folder = train(make_recipe(steps=1), tmp_path / "run", console=quiet)
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="is busy"):
        train(make_recipe(steps=2), folder, resume=True, console=quiet)


def test_a_run_that_cannot_begin_leaves_no_folder(make_recipe, tmp_path, quiet):
    recipe = make_recipe()
    recipe.backbone = recipe.backbone.model_validate(
        {"use": "stable_diffusion", **recipe.backbone.options, "checkpoint": str(tmp_path / "missing")}
    )
    with pytest.raises(UserError, match="backbone"):
        train(recipe, tmp_path / "run", console=quiet)
    assert not (tmp_path / "run").exists()


def test_a_signal_stops_with_a_checkpoint_and_the_run_is_continued_from_it(make_recipe, tmp_path, quiet, monkeypatch):
    run_step = Trainer.run_step

    def with_signal(trainer):
        metrics = run_step(trainer)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    monkeypatch.setattr(Trainer, "run_step", with_signal)
    with pytest.raises(Stopped, match="after step 3. To continue: .*--resume") as stopped:
        train(make_recipe(), tmp_path / "run", console=quiet)
    assert stopped.value.exit_code == 143
    monkeypatch.setattr(Trainer, "run_step", run_step)
    train(make_recipe(), tmp_path / "run", resume=True, console=quiet)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_resuming_with_another_recipe_is_refused_and_more_steps_are_not(make_recipe, tmp_path, quiet):
    train(make_recipe(steps=2), tmp_path / "run", console=quiet)
    with pytest.raises(UserError, match="started with seed = 0, but now it is 1"):
        train(make_recipe(steps=3, seed=1), tmp_path / "run", resume=True, console=quiet)
    train(make_recipe(steps=3), tmp_path / "run", resume=True, console=quiet)
    assert steps_of(tmp_path / "run") == [1, 2, 3]


def test_lines_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.add(step, {"loss": float("nan") if step == 1 else 0.5})
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')
    metrics.cut(2)
    rows = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
