"""Whole runs as a user starts them: killed and continued, and on two and four processes instead of one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run import checkpoints
from agsm_rl.run.lifecycle import train

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path):
    """AGSM, DDPO and DPO on streamed preferences over tokens and LoRA on the tiny base; a checkpoint each step."""
    rewards = {"jpeg_incompressibility": 1.0, "sharp": {"use": "sharpness", "weight": -0.5, "normalise": "z_score"}}
    rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": rewards}
    rollouts |= {"num_prompts": 2, "images_per_prompt": 4, "num_steps": 3, "guidance": 1.0, "updates": 2}
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8, "num_images": 24}
    preferences = {"use": "preferences", "dataset": "builtin:shapes-preferences", "batch_size": 4, "num_pairs": 14}
    preferences |= {"streaming": True, "shuffle_buffer": 6}
    content = {
        "steps": 6,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"tokens": {"use": "soft_tokens"}, "lora": {"use": "lora", "rank": 2, "banks": 2}},
        "ema": {"decay": 0.9},
        "sources": {"own": rollouts},
        "objectives": [
            {"use": "agsm", "source": pairs},
            {"use": "ddpo", "source": "own", "weight": {0: 0.5, 4: 1.0}},
            {"use": "diffusion_dpo", "beta": 10.0, "source": preferences},
        ],
        "checkpoint": {"every": 1},
        "sample": {"every": 100, "num_images": 1, "num_steps": 2, "prompts": ["a red star"]},
        "track": [],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(recipe, folder, *more):
    return [sys.executable, "-m", "agsm_rl", "train", str(recipe), "--run-dir", str(folder), *more]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(first, second, tolerance):
    rows, others = metrics_of(first), metrics_of(second)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        timed = {key for key in row if "second" in key}
        assert {key: value for key, value in row.items() if key not in timed} == pytest.approx(
            {key: value for key, value in other.items() if key not in timed}, rel=tolerance, abs=tolerance
        )
    files = sorted(path.name for path in (first / "adapter").glob("*.safetensors"))
    assert files == sorted(path.name for path in (second / "adapter").glob("*.safetensors")) != []
    for name in files:
        one, other = load_file(first / "adapter" / name), load_file(second / "adapter" / name)
        assert max(float((one[key] - other[key]).abs().max()) for key in one) <= tolerance


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(recipe, tmp_path):
    whole = train(Recipe.from_yaml(recipe), tmp_path / "whole")
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(recipe, killed), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (killed / "metrics.jsonl").exists() or len(metrics_of_partial(killed)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = CliRunner().invoke(app, command(recipe, killed, "--resume")[3:])
    assert resumed.exit_code == 0, resumed.output
    assert_same_run(whole, killed, 1e-6)


def metrics_of_partial(folder):
    """Lines that are whole; the last may be half-written at this moment."""
    return [line for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1] if line.endswith("}")]


BROKEN_ON_ONE = """
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.objectives.score_matching import ScoreMatching
from agsm_rl.policy import Policy
from agsm_rl.sources.pairs import Pairs
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.anomalies import AnomalyWatch

accelerator = Accelerator(cpu=True)


class BrokenOnOne(ScoreMatching):
    def loss(self, policy, batch):
        loss, figures = super().loss(policy, batch)
        broken = trainer.step == 1 and accelerator.process_index == 1
        return (loss * float("nan") if broken else loss), figures


policy = Policy(StableDiffusion(sys.argv[1], device="cpu"), {"lora": LoRA(rank=2)}, ema_decay=0.5)
term = Term(BrokenOnOne(), Pairs("builtin:shapes", batch_size=4, num_images=8), name="matching")
trainer = Trainer(policy, [term], steps=3, accelerator=accelerator, watch=AnomalyWatch(non_finite="skip"))
skipped = ["matching/skipped" in trainer.run_step() for _ in range(3)]
state = trainer.state_dict()
torch.save({"skipped": skipped, **state}, Path(sys.argv[2]) / f"{accelerator.process_index}.pt")
"""


def test_a_loss_that_is_not_finite_on_one_process_is_skipped_by_all(tiny_checkpoint, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BROKEN_ON_ONE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, str(script), str(tiny_checkpoint), str(tmp_path)], check=True, timeout=600)
    first, second = (torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in (0, 1))
    assert first["skipped"] == second["skipped"] == [False, True, False]
    assert first["sources"] == second["sources"]
    assert first["watch"] == second["watch"]
    for which in ("live", "ema"):
        for name, value in first["policy"][which].items():
            assert torch.isfinite(value).all()
            assert torch.equal(value, second["policy"][which][name])


def launch(count):
    """The command and environment that start `count` processes on the CPU, where they are not accelerate's business."""
    options = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "accelerate.commands.launch", *options], environment


@pytest.fixture(scope="module")
def every_objective(tiny_checkpoint, tmp_path_factory):
    """A recipe of two steps over all objectives that share batches, and its run on one process."""
    folder = tmp_path_factory.mktemp("every-objective")
    # A smooth reward: rounding moves JPEG's size by a whole byte.
    rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"sharpness": 1.0}}
    rollouts |= {"num_prompts": 4, "images_per_prompt": 4, "num_steps": 2, "guidance": 1.0, "updates": 2}
    grouped = rollouts | {"advantages": "group", "images_per_prompt": 2, "updates": 1, "sample_batch_size": 2}
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8, "num_images": 24}
    preferences = {"use": "preferences", "dataset": "builtin:shapes-preferences", "batch_size": 4, "num_pairs": 14}
    backprop = {"rewards": {"sharpness": 1.0}, "num_steps": 2, "guidance": 1.0}
    content = {
        "steps": 2,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"tokens": {"use": "soft_tokens"}, "lora": {"use": "lora", "rank": 2, "banks": 2}},
        "ema": {"decay": 0.9},
        "sources": {"own": rollouts, "grouped": grouped, "pairs": pairs},
        "objectives": [
            {"use": "agsm", "group_size": 2, "source": "pairs"},
            {"use": "softrepa", "group_size": 2, "source": "pairs"},
            {"use": "ddpo", "source": "own"},
            {"use": "diffusion_nft", "source": "own"},
            {"use": "flow_grpo", "source": "grouped"},
            {"use": "diffusion_dpo", "source": preferences},
            {"use": "reward_backprop", **backprop, "source": {"use": "prompts", "prompts": "builtin:shapes-prompts"}},
        ],
        "sample": {"every": 100, "num_images": 1, "num_steps": 2, "prompts": ["a red star"]},
        "evaluate": {"num_images": 5, "num_steps": 2, "batch_size": 1, "guidance": [2.0]}
        | {"rewards": ["sharpness"], "keep_base": False},  # each run draws the base
        "track": [],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, train(Recipe.from_yaml(path), folder / "one")


@pytest.mark.parametrize("count", [2, 4])
def test_more_processes_with_a_share_of_the_batch_each_equal_one_process_with_all_of_it(
    every_objective, tmp_path, count
):
    path, one = every_objective
    launcher, environment = launch(count)
    done = subprocess.run(
        [*launcher, *command(path, tmp_path / "more")[2:]],
        check=True,
        capture_output=True,
        timeout=900,
        env=environment,
    )
    assert f"{count} processes" in done.stderr.decode() and done.stdout.count(b"run folder") == 1
    assert_same_run(one, tmp_path / "more", 2e-4)
    alone, shared = (json.loads((folder / "eval.json").read_text()) for folder in (one, tmp_path / "more"))
    assert alone["base"] == shared["base"]  # the base is the same model, and its images the same to the bit
    for row, other in zip(alone["images"], shared["images"], strict=True):
        assert row["prompt"] == other["prompt"]
        assert row["rewards"]["sharpness"] == pytest.approx(other["rewards"]["sharpness"], abs=0.01)
    first, second = (sorted((folder / "samples/eval").rglob("base/*.png")) for folder in (one, tmp_path / "more"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] and len(first) == 5


def workers_of(launcher):
    """The launcher's processes by their rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in map(int, children)}
    return {
        int(entry[len(b"RANK=") :]): pid
        for pid, entries in environments.items()
        for entry in entries
        if entry.startswith(b"RANK=")
    }


def said_after(signal_it, recipe, folder, *more, lines):
    """What two processes of a run say, one of which got a signal when so many steps' figures were written."""
    launcher, environment = launch(2)
    process = subprocess.Popen(
        [*launcher, *command(recipe, folder, *more)[2:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 600
        while not (folder / "metrics.jsonl").exists() or len(metrics_of_partial(folder)) < lines:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workers = workers_of(process)
        signal_it(process, workers)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    words = " ".join(said.decode().split())
    assert "agsm_rl/run/lifecycle.py" not in words  # messages, not tracebacks of ours
    return words


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_run_which_says_how_to_continue(recipe, tmp_path, killed):
    def kill(process, workers):
        os.kill(workers[killed], signal.SIGKILL)

    # The third step's line comes after a checkpoint of the second: draws are learned from whole.
    words = said_after(kill, recipe, tmp_path / "run", "--set", "steps=100000", lines=3)
    assert f"agsm-rl: process {1 - killed} of 2: lost after step" in words
    assert "--resume" in words and "exitcode : -9" in words
    step, _ = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert step >= 1 and str(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.pt") in words


def test_a_signal_in_the_last_evaluation_stops_all_processes_cleanly(recipe, tmp_path):
    def stop(process, workers):
        process.send_signal(signal.SIGTERM)

    more = ["--set", "steps=2", "--set", "evaluate.num_images=3000"]
    words = said_after(stop, recipe, tmp_path / "run", *more, lines=2)
    assert words.count("agsm-rl: stopped by SIGTERM after step 2, the last, in the evaluation") == 1
    assert "lost after step" not in words
    step, _ = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert step == 2 and not (tmp_path / "run" / "eval.json").exists()


def test_a_signal_to_one_process_stops_all_of_them_cleanly(recipe, tmp_path):
    def stop_one(process, workers):
        os.kill(workers[1], signal.SIGTERM)

    more = ["--set", "steps=100000", "--set", "evaluate.num_images=3000"]
    words = said_after(stop_one, recipe, tmp_path / "run", *more, lines=2)
    assert words.count("agsm-rl: stopped by SIGTERM after step") == 1
    assert "lost after step" not in words and "in the evaluation" not in words
