"""Sweeps as processes, as a user starts them: exit codes, kills at any moment, a failing cell's log, and Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sweep_parts import EVALUATE
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.sweep.executors import open_executor, threads_per_worker

pytestmark = pytest.mark.slow
RUN = Path("runs/mine")
STEPS = 30


def cells(folder=RUN):
    return {row["cell"]: row for row in json.loads((folder / "sweep.json").read_text())["cells"]}


def lines_of(cell, folder=RUN):
    file = folder / "cells" / cell / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def wait_until(there, process):
    """Wait as long as the process lives."""
    while not there():
        assert process.poll() is None, f"it ended with exit code {process.returncode}"
        time.sleep(0.02)


@pytest.fixture
def start(request):
    """Start `agsm-rl sweep …` as a process, which does not outlive the test."""

    def start(*arguments):
        command = [sys.executable, "-m", "agsm_rl", "sweep", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        request.addfinalizer(process.kill)
        return process

    return start


def test_a_killed_sweep_continues_and_ends_like_an_uninterrupted_one(write, start):
    file = write(set={"steps": STEPS}, evaluate=EVALUATE[:1])
    sweep = start(file)
    wait_until(lambda: len(lines_of("mine-seed0")) > 3, sweep)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    # Started again at once: the orphaned cell writes its checkpoint and ends; the new one waits for it.
    again = start(file)
    out, told = again.communicate()
    assert again.returncode == 0, told
    assert "mine-seed0: continues" in out
    log = (RUN / "logs" / "mine-seed0.log").read_text()
    assert "stopped by SIGTERM after step" in log and "continuing runs/mine/cells/mine-seed0 after step" in log
    assert [json.loads(line)["step"] for line in lines_of("mine-seed0")] == list(range(1, STEPS + 1))
    assert cells()["mine-seed0"]["status"] == "done"
    whole = CliRunner().invoke(app, ["sweep", file, "--dir", "whole"])
    assert whole.exit_code == 0, whole.output
    adapter = Path("cells/mine-seed0/adapter/pytorch_lora_weights.safetensors")
    killed, unbroken = load_file(RUN / adapter), load_file("whole" / adapter)
    assert all(killed[name].equal(unbroken[name]) for name in unbroken)


def test_a_signal_leaves_a_checkpoint_and_says_how_to_continue(write, start):
    sweep = start(write(set={"steps": 10_000}, evaluate=EVALUATE[:1]))
    wait_until(lambda: len(lines_of("mine-seed0")) > 1, sweep)
    sweep.send_signal(signal.SIGTERM)
    _, told = sweep.communicate()
    assert sweep.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM. To continue: agsm-rl sweep runs/mine/sweep.yaml" in told
    assert cells()["mine-seed0"]["status"] == "pending"
    steps = len(lines_of("mine-seed0"))
    assert (RUN / f"cells/mine-seed0/checkpoints/step-{steps:08d}.pt").is_file()


def test_a_failing_cell_keeps_its_last_lines_and_sets_the_exit_code(write):
    broken = {"objectives.0.source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 1}}
    file = write(axes={"objective": {"broken": broken, "plain": {}}}, evaluate=EVALUATE[:1])
    result = CliRunner().invoke(app, ["sweep", file, "--workers", "2"])
    assert result.exit_code == 1
    assert "1 of 2 cells failed" in result.stderr
    assert (cells()["broken-seed0"]["status"], cells()["plain-seed0"]["status"]) == ("failed", "done")
    said = "fewer than batch_size 4"
    assert said in cells()["broken-seed0"]["error"]
    assert said in (RUN / "logs" / "broken-seed0.log").read_text()


def test_a_mistake_gives_one_message_and_check_runs_nothing(write):
    result = CliRunner().invoke(app, ["sweep", write(axes={"a": {"b": {"steps": "x"}}})])
    assert (result.exit_code, result.stdout, len(result.stderr.strip().splitlines())) == (2, "", 1)
    assert "cell 'b-seed0': steps" in result.stderr
    axes = {"a": {"b": {}, "c": {"start_from": "b"}}}
    result = CliRunner().invoke(app, ["sweep", write(axes=axes), "--check", "--set", "budget.steps=7"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["b-seed0: 7 steps", "c-seed0: 7 steps, from b-seed0", "mine.yaml: ok"]
    assert not Path("runs").exists()


def test_workers_share_the_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert threads_per_worker(1) == cores
    assert threads_per_worker(cores) == threads_per_worker(2 * cores) == 1


def test_cells_run_as_tasks_of_ray(write):
    pytest.importorskip("ray")
    result = CliRunner().invoke(app, ["sweep", write(evaluate=EVALUATE[:1]), "--executor", "ray", "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert cells()["mine-seed0"]["status"] == "done"
    assert len(lines_of("mine-seed0")) == 2


def test_without_ray_the_message_says_how_to_get_it(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    told = pytest.raises(UserError, match=r"--executor ray needs Ray, .*run `pip install 'agsm-rl\[ray\]'`")
    with told, open_executor("ray", workers=1):
        pass
