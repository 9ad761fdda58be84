"""Rewards do not depend on the trainer, and the worker's side depends on nothing but Python."""

import ast
import sys
from pathlib import Path

import agsm_rl_rewards

FOLDER = Path(agsm_rl_rewards.__file__).parent
ALLOWED = {"agsm_rl", "agsm_rl.errors", "agsm_rl.files", "agsm_rl.shapes.judge", "agsm_rl.shapes.world"}
ALLOWED |= {"agsm_rl.shapes.worlds", "agsm_rl.shapes.scenes"}
"""`agsm_rl` is for `from agsm_rl import registry`, by which ray_pool finds the reward that it is to run."""


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_rewards_import_nothing_of_the_trainer():
    names = {name for file in FOLDER.rglob("*.py") for name in imported(file)}
    assert {name for name in names if name == "agsm_rl" or name.startswith("agsm_rl.")} <= ALLOWED


def test_the_workers_side_needs_nothing_but_python():
    names = set(imported(FOLDER / "worker_side" / "agsm_rl_worker.py")) | set(imported(FOLDER / "worker/watchdog.py"))
    others = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
    assert others <= {"numpy", "PIL"}  # only for a reward that takes its images that way
