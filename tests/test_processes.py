"""Whole runs as a user starts them: killed and continued, and on two processes instead of one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path):
    """AGSM, DDPO and DPO on streamed preferences over tokens and LoRA on the tiny base; a checkpoint each step."""
    rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"jpeg_incompressibility": 1.0}}
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


def test_a_run_killed_and_continued_equals_the_uninterrupted_one(recipe, tmp_path):
    subprocess.run(command(recipe, tmp_path / "whole"), check=True, capture_output=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(recipe, killed), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (killed / "metrics.jsonl").exists() or len(metrics_of_partial(killed)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(recipe, killed, "--resume"), check=True, capture_output=True)
    assert_same_run(tmp_path / "whole", killed, 1e-6)


def metrics_of_partial(folder):
    """Lines that are whole; the last may be half-written at this moment."""
    return [line for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1] if line.endswith("}")]


def test_two_processes_with_half_the_batch_each_equal_one_process_with_all_of_it(recipe, tmp_path):
    subprocess.run(command(recipe, tmp_path / "one"), check=True, capture_output=True)
    # `accelerate launch --cpu --num_processes 2` starts one process only; torchrun starts two.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = [*launch, *command(recipe, tmp_path / "two")[1:]]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(two, check=True, capture_output=True, timeout=600, env=environment)
    assert b"2 processes" in done.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two", 2e-4)
