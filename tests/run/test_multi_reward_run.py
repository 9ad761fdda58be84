"""Runs on several rewards: held-out ones beside them, the best kept, ended by a rule, all of it continued exactly."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.export.attach import read_export
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run import checkpoints
from agsm_rl.run.evaluation import Evaluator
from agsm_rl.run.lifecycle import train
from agsm_rl.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "recipes" / "multi_reward.yaml"
EVALUATION = {"every": 1, "num_images": 4, "num_steps": 2, "guidance": [1.0], "batch_size": 3}
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def make_recipe(tiny_checkpoint):
    """Learns to draw dark pictures (a negative weight), looked at in each step; `sharp` is held out."""

    def make(**changes) -> Recipe:
        objective = {"use": "reward_backprop", "rewards": {"light": {"use": "brightness", "weight": -1.0}}}
        objective |= {"num_steps": 2, "guidance": 1.0}
        objective |= {"source": {"use": "prompts", "prompts": "builtin:shapes-prompts", "batch_size": 2}}
        rewards = {"light": {"use": "brightness"}, "sharp": {"use": "sharpness"}}
        content = {
            "steps": 3,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "ema": {"decay": 0.5},
            "objectives": [objective],
            "optimizer": {"learning_rate": 0.03},
            "evaluate": EVALUATION | {"rewards": rewards},
            "checkpoint": {"every": 1, "keep": 1},
            "sample": {"prompts": ["a red star"], "num_images": 1, "num_steps": 2},
            "track": [],
        }
        return Recipe.from_data(content | changes)

    return make


@pytest.fixture
def console():
    return Console(file=StringIO(), width=1000)


def said(console):
    return console.file.getvalue()


def checkpoints_of(folder):
    return sorted(int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob("*.pt"))


def lora_of(folder):
    return read_export(folder / LORA)


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def rows_of(folder):
    """The lines of metrics.jsonl, but for how long each step took."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def assert_same_run(first, second):
    one, other = checkpoints.newest(first / "checkpoints"), checkpoints.newest(second / "checkpoints")
    assert one[0] == other[0]
    assert same(one[1], other[1])
    assert checkpoints_of(first) == checkpoints_of(second)
    assert rows_of(first) == rows_of(second)
    for file in ("evaluations.jsonl", "eval.json"):
        assert (first / file).read_text() == (second / file).read_text()
    assert (first / "events.jsonl").exists() == (second / "events.jsonl").exists()
    assert same(lora_of(first / "adapter-best"), lora_of(second / "adapter-best"))


@pytest.fixture
def kept(make_recipe, tmp_path, console):
    """A run whose best by `light` is its first step, as each step darkens."""
    recipe = make_recipe(checkpoint={"every": 1, "keep": 1, "best": "light"})
    return recipe, train(recipe, tmp_path / "kept", console=console)


def test_the_best_by_a_score_is_kept_beside_the_newest_and_its_adapters_exported(kept, console):
    _, folder = kept
    found = json.loads((folder / "eval.json").read_text())
    values = [json.loads(line)["reward/light"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert values == sorted(values, reverse=True)
    assert (found["best"]["by"], found["best"]["step"], found["best"]["value"]) == ("light", 1, values[0])
    assert found["best"]["base"] > values[0]
    assert checkpoints_of(folder) == [1, 3]
    tensors, metadata = lora_of(folder / "adapter-best")
    assert metadata["step"] == "1"
    kept_state = checkpoints.of_step(folder / "checkpoints", 1)["policy"]["live"]
    assert {float(value.sum()) for value in kept_state.values()} == {float(value.sum()) for value in tensors.values()}
    assert not same(tensors, lora_of(folder / "adapter")[0])
    assert [path.name for path in folder.glob(".adapter*")] == []


def test_evaluated_rewards_are_marked_as_trained_on_or_held_out(kept, console, capsys):
    _, folder = kept
    assert json.loads((folder / "eval.json").read_text())["reward_roles"] == {"light": "trained", "sharp": "held_out"}
    assert "reward/light (trained)" in said(console)
    assert "reward/sharp (held out)" in said(console)


def test_a_best_export_left_outdated_by_a_kill_is_fixed_when_the_run_continues(kept, console):
    recipe, folder = kept
    before = lora_of(folder / "adapter-best")
    shutil.rmtree(folder / "adapter-best")
    newest = lora_of(folder / "adapter")
    train(recipe, folder, resume=True, console=console)
    assert same(before, lora_of(folder / "adapter-best"))
    assert same(newest, lora_of(folder / "adapter"))


def test_a_missing_best_checkpoint_is_reported_with_a_remedy(kept, console):
    recipe, folder = kept
    shutil.rmtree(folder / "adapter-best")
    (folder / "checkpoints" / "step-00000001.pt").unlink()
    with pytest.raises(UserError, match="best evaluation so far was at step 1.*--set checkpoint.best=null"):
        train(recipe, folder, resume=True, console=console)


@pytest.mark.parametrize("moment", ["before the evaluation", "in the evaluation", "after the evaluation"])
def test_a_run_killed_around_an_evaluation_ends_as_the_uninterrupted_one(kept, tmp_path, console, monkeypatch, moment):
    class Killed(BaseException):
        pass

    recipe, whole = kept
    killed = tmp_path / "killed"
    with monkeypatch.context() as patched:
        place = {"before the evaluation": "on_step", "in the evaluation": "_note", "after the evaluation": "on_step"}
        original = getattr(Evaluator, place[moment])

        def dying(self, trainer, *rest):
            if trainer.step == 2 and not moment.startswith("after"):
                raise Killed
            found = original(self, trainer, *rest)
            if trainer.step == 2:
                raise Killed
            return found

        patched.setattr(Evaluator, place[moment], dying)
        with pytest.raises(Killed):
            train(recipe, killed, console=console)
    train(recipe, killed, resume=True, console=console)
    assert_same_run(whole, killed)


def test_a_rule_ends_the_run_cleanly_and_is_reported_everywhere(make_recipe, tmp_path, console):
    recipe = make_recipe(steps=50, stop_when={"light": {"falls_by": 1e-4}})
    folder = train(recipe, tmp_path / "run", console=console)
    (event,) = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    step = event["step"]
    assert step < 50
    assert (event["watch"], event["subject"], event["action"]) == ("stop_when", "light", "stop")
    assert "stop_when: 'light' fell by" in said(console)
    assert json.loads((folder / "eval.json").read_text())["ended_by"] == event
    assert checkpoints_of(folder) == [step]
    assert lora_of(folder / "adapter")[1]["step"] == str(step)

    train(recipe, folder, resume=True, console=console)  # the rule still holds
    assert checkpoints_of(folder) == [step]
    assert len((folder / "events.jsonl").read_text().splitlines()) == 1
    train(make_recipe(steps=step + 1), folder, resume=True, console=console)
    assert checkpoints_of(folder) == [step + 1]


def test_a_run_stopped_by_a_watch_leaves_an_event_and_its_last_checkpoint(make_recipe, tmp_path, console, monkeypatch):
    run_step = Trainer.run_step

    def with_broken_weights(trainer):
        if trainer.step == 1:
            with torch.no_grad():
                next(iter(trainer.parameters.values())).fill_(float("nan"))
        return run_step(trainer)

    monkeypatch.setattr(Trainer, "run_step", with_broken_weights)
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2, "num_images": 8}
    recipe = make_recipe(evaluate=None, objectives=[{"use": "score_matching", "source": pairs}])
    with pytest.raises(UserError, match="step 2: objective 'score_matching': its loss is nan"):
        train(recipe, tmp_path / "run", console=console)
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (event["step"], event["watch"]) == (2, "non_finite")
    assert (event["subject"], event["value"], event["action"]) == ("score_matching", "nan", "stop")
    assert checkpoints_of(tmp_path / "run") == [1]


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_reported(
    make_recipe, tmp_path, console, monkeypatch
):
    (tmp_path / "opposite.py").write_text(
        "class Opposite:\n    name, range, differentiable = 'opposite', (-1.0, 0.0), False\n\n"
        "    def __call__(self, images, prompts):\n        return images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    base = make_recipe().to_data()
    base["evaluate"]["rewards"]["opposite"] = {"use": "opposite:Opposite"}
    recipe = Recipe.from_data(base, allow_imports=["opposite"])
    train(recipe, tmp_path / "run", console=console)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = {event["subject"]: event for event in events if event["watch"] == "held_out_falls"}
    assert told["opposite"]["action"] == "warn"
    assert "while 'light', which is trained on, went from" in told["opposite"]["message"]


def test_the_ema_is_exported_and_measured_if_the_recipe_says_so(make_recipe, tmp_path, console):
    evaluation = EVALUATION | {"every": None, "rewards": {"light": {"use": "brightness"}}}
    found = {}
    for export in ("live", "ema"):
        folder = train(make_recipe(export=export, evaluate=evaluation), tmp_path / export, console=console)
        tensors, metadata = lora_of(folder / "adapter")
        assert metadata["weights"] == export
        state = checkpoints.newest(folder / "checkpoints")[1]["policy"][export]
        assert {float(value.sum()) for value in state.values()} == {float(value.sum()) for value in tensors.values()}
        found[export] = json.loads((folder / "eval.json").read_text())["rewards"]["light"]
    assert found["ema"] > found["live"]  # the shadow lags behind in growing dark
    assert rows_of(tmp_path / "live") == rows_of(tmp_path / "ema")


def test_ddpo_learns_from_two_weighted_rewards_with_a_third_held_out(tiny_checkpoint, tmp_path, console):
    content = yaml.safe_load(RECIPE.read_text())
    content["backbone"] = {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"}
    content["sources"]["own_images"] |= {"num_prompts": 2, "images_per_prompt": 4, "num_steps": 2}
    content["evaluate"] |= {"every": 2, "num_images": 4, "num_steps": 2}
    content["sample"] |= {"every": 100, "num_images": 1, "num_steps": 2}
    content |= {"steps": 4, "track": []}
    folder = train(Recipe.from_data(content), tmp_path / "run", console=console)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"ddpo/reward/shapes", "ddpo/reward/small", "ddpo/reward"} <= set(rows[0])
    found = json.loads((folder / "eval.json").read_text())
    assert found["reward_roles"] == {"shapes": "trained", "small": "trained", "sharpness": "held_out"}
    assert set(found["rewards"]) == {"shapes", "small", "sharpness"}
    assert found["best"]["by"] == "strict"
    assert (folder / "adapter-best" / LORA).is_file()
