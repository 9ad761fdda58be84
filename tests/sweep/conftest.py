"""Small sweeps on the tiny base, and an executor that runs cells in this process, one at a time."""

from concurrent.futures import Future
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from sweep_parts import EVALUATE, PAIRS

from agsm_rl.sweep import evaluations
from agsm_rl.sweep.cell import run_cell
from agsm_rl.sweep.executors import Outcome
from agsm_rl.sweep.job import Job
from agsm_rl.sweep.plan import make_plan
from agsm_rl.sweep.run import run_sweep


class InProcess:
    """Runs cells in this process; `ran` lists them in the order in which they ran."""

    capacity = 1

    def __init__(self) -> None:
        self.ran: list[str] = []

    def submit(self, job: Path, log: Path) -> "Future[Outcome]":
        self.ran.append(job.stem)
        future: Future[Outcome] = Future()
        try:
            run_cell(Job.read(job))
            future.set_result(Outcome(0, 1.0, ""))
        except Exception as error:
            future.set_result(Outcome(2, 1.0, f"agsm-rl: {error}"))
        return future

    def stop(self) -> None:
        pass


@pytest.fixture
def recipe(tiny_checkpoint):
    """Score matching over LoRA on the tiny base, as data."""
    return {
        "steps": 2,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "objectives": [{"use": "score_matching", "source": PAIRS}],
        "checkpoint": {"every": 1},
        "sample": {"prompts": ["a red star"], "num_images": 1, "num_steps": 1},
        "track": [],
    }


@pytest.fixture
def write(recipe, tmp_path, monkeypatch):
    """Write a sweep over that recipe to mine.yaml in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def write(**changes) -> str:
        content = {"recipe": recipe, "evaluate": EVALUATE} | changes
        Path("mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return "mine.yaml"

    return write


@pytest.fixture
def plan(write):
    """The plan of such a sweep."""
    return lambda allow_imports=(), **changes: make_plan(write(**changes), allow_imports=allow_imports)


@pytest.fixture
def sweep(plan):
    """Run such a sweep; returns the board, and the cells that ran."""

    def sweep(**changes):
        executor = InProcess()
        board = run_sweep(plan(**changes), executor, console=Console(file=StringIO()))
        return board, executor.ran

    return sweep


@pytest.fixture
def measured(monkeypatch):
    """The evaluations that are actually made: (split, whether an adapter was attached)."""
    made = []
    measure = evaluations.measure

    def noting(backbone, entry, options, guidance, **more):
        adapted = any("lora" in name for name, _ in backbone.denoiser.named_modules())
        made.append((options.split, adapted))
        return measure(backbone, entry, options, guidance, **more)

    monkeypatch.setattr(evaluations, "measure", noting)
    return made
