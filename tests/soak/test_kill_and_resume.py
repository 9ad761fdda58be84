"""The soak script in short: a few kills at random moments. The recorded hundred is in results/kill_and_resume.json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(tmp_path):
    result = tmp_path / "result.json"
    script = [sys.executable, str(HERE / "kill_and_resume.py"), "--kills", "2", "--seed", "1", "--json", str(result)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["kills"] == 2 and found["second_process_refused"] and found["same"]
    assert max(found["largest_difference"].values()) <= 1e-6


@pytest.mark.slow
def test_memory_and_handles_do_not_grow_in_a_hundred_steps(tmp_path):
    result = tmp_path / "result.json"
    script = [sys.executable, str(HERE / "long_run.py"), "--steps", "100", "--json", str(result)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    found = json.loads(result.read_text())
    assert found["handles_left"] == [] and found["processes_left"] == 0, found
    assert found["file_handles"]["last"] <= found["file_handles"]["first"], done.stderr[-2000:]
