"""Kill a run by SIGKILL at random moments, resume it, and compare it with the run that nobody disturbed.

    python tests/soak/kill_and_resume.py --kills 100 --json tests/soak/results/kill_and_resume.json

The run is AGSM + DDPO on one shared source of rollouts, over soft tokens and LoRA on the tiny pipeline, with
checkpoints, evaluations and sample grids every few steps. Each attempt is a process of its own that calls what
`agsm-rl train --resume` calls; it is forked from a process that has imported the libraries, which saves the ten seconds
that importing takes and changes nothing else. The moment of a kill is a random time after a random one of PHASES
begins; where the run really was when it died is what is counted. Ends with exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_pipelines import save_tiny

from agsm_rl.errors import UserError
from agsm_rl.export.attach import write_export
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run import checkpoints
from agsm_rl.run.evaluation import Evaluator
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.lifecycle import train
from agsm_rl.run.sample_grids import SampleGrids
from agsm_rl.sources.rollouts import Rollouts
from agsm_rl.trainer import Trainer

PHASES = ("start", "step", "rollout", "checkpoint", "adapter export", "evaluation", "sample grid", "between")
TOLERANCE = 1e-6


def recipe(base: Path) -> Recipe:
    """Everything that has a state: shared rollouts in shares, reward histories, two adapters, an EMA, a schedule."""
    own = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"jpeg_incompressibility": 1.0}}
    own |= {"num_prompts": 2, "images_per_prompt": 4, "num_steps": 3, "guidance": 1.0, "updates": 2, "min_history": 2}
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 12}
    view = {"use": "best_images", "share": 1.0, "min_advantage": -5.0}
    return Recipe.from_data(
        {
            "steps": 8,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(base), "device": "cpu"},
            "adapters": {"tokens": {"use": "soft_tokens"}, "lora": {"use": "lora", "rank": 2, "banks": 2}},
            "ema": {"decay": 0.9},
            "sources": {"own": own},
            "objectives": [
                {"use": "agsm", "source": pairs, "name": "agsm_on_pairs"},
                {"use": "agsm", "source": "own", "view": view, "name": "agsm_on_own"},
                {"use": "ddpo", "source": "own", "weight": {0: 0.5, 6: 1.0}},
            ],
            "evaluate": {"every": 3, "num_images": 6, "num_steps": 2, "guidance": [1.0]},
            "sample": {"every": 3, "num_images": 2, "num_steps": 2, "guidance": 1.0},
            "checkpoint": {"every": 2, "keep": 1},
            "track": [],
        }
    )


class Marker:
    """A byte of shared memory that says in which phase the run is, so that the parent can aim and count."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self, phase: str) -> None:
        self._byte[0] = PHASES.index(phase)

    def get(self) -> str:
        return PHASES[self._byte[0]]

    def around(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, with the phase marked while it lasts."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            before = self.get()
            self.set(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self.set("between" if before == "start" else before)

        return marked


def mark_phases(marker: Marker) -> None:
    """Only observes: each function does what it did."""
    import agsm_rl.export.attach as attachment

    Trainer.run_step = marker.around("step", Trainer.run_step)
    Rollouts._draw = marker.around("rollout", Rollouts._draw)
    Evaluator.measure = marker.around("evaluation", Evaluator.measure)
    SampleGrids.draw = marker.around("sample grid", SampleGrids.draw)
    checkpoints.save = marker.around("checkpoint", checkpoints.save)
    attachment.write_export = marker.around("adapter export", write_export)


def attempt(made: Recipe, folder: Path, log: Path) -> int:
    """Train or resume in a forked process; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        train(made, folder, resume=(folder / "recipe.yaml").exists(), console=Console(file=StringIO()))
        code = 0
    except BaseException as error:
        with log.open("a") as file:
            file.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


class Ended(Exception):
    """The run came to its end before the kill."""


def kill_in(phase: str, child: int, marker: Marker, rng: random.Random, lengths: dict[str, float]) -> str:
    """SIGKILL at a random time after the phase begins (an end of the run raises Ended); the phase it died in."""
    deadline = time.monotonic() + 900
    while marker.get() != phase:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise Ended
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise RuntimeError(f"the run never came to '{phase}'")
        time.sleep(0.0002)
    time.sleep(rng.random() * lengths[phase])
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise Ended
    return marker.get()


def is_refused(made: Recipe, folder: Path) -> bool:
    """Whether a second process may not train in the folder of a running one."""
    try:
        RunFolder(folder).check(made, resume=True)
    except UserError as error:
        return "is busy" in str(error)
    return False


def difference(one: Any, other: Any, place: str = "") -> float:
    """The largest difference between two trees of numbers and tensors; AssertionError where they are not alike."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape, place
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, dict):
        assert list(one) == list(other), f"{place}: {list(one)} and {list(other)}"
        return max([difference(one[key], other[key], f"{place}.{key}") for key in one], default=0.0)
    if isinstance(one, list | tuple):
        assert len(one) == len(other), place
        return max(
            [difference(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))], default=0.0
        )
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(1.0, abs(one))
    assert one == other, f"{place}: {one!r} and {other!r}"
    return 0.0


def compare(whole: Path, resumed: Path) -> dict[str, float]:
    """Files alike, and the largest difference in each of what a run leaves."""
    files = [sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) for run in (whole, resumed)]
    assert files[0] == files[1], f"files differ: {sorted(set(files[0]) ^ set(files[1]))}"
    runs = (whole, resumed)

    def rows(file: Path) -> list[dict[str, Any]]:
        """Without how long each step took, which no two runs have in common."""
        return [json.loads(line) | {"seconds": None} for line in file.read_text().splitlines()]

    def lines(name: str) -> float:
        return difference(*(rows(run / name) for run in runs), name)

    found = {name: lines(name) for name in ("metrics.jsonl", "evaluations.jsonl", "image_scores.jsonl")}
    found["eval.json"] = difference(*(json.loads((run / "eval.json").read_text()) for run in runs), "eval.json")
    for file in sorted((whole / "adapter").glob("*.safetensors")):
        found[f"adapter/{file.name}"] = difference(*(load_file(run / "adapter" / file.name) for run in runs), file.name)
    found["last checkpoint"] = difference(*(checkpoints.newest(run / "checkpoints") for run in runs), "checkpoint")
    return found


def soak(kills: int, minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Kill `kills` times, or for so many minutes, over as many runs as that takes; what happened."""
    marker, rng = Marker(), random.Random(seed)
    mark_phases(marker)
    base = save_tiny("sd15", folder / "base")
    made = recipe(base)
    log = folder / "log.txt"
    began = time.monotonic()
    marker.set("start")
    os.waitpid(attempt(made, folder / "whole", log), 0)
    assert (folder / "whole" / "eval.json").exists(), log.read_text()
    duration = time.monotonic() - began
    # About as long as each phase lasts in a run of a few seconds.
    lengths = dict.fromkeys(PHASES, 0.02) | {"start": duration / 4, "step": 0.2, "rollout": 0.05, "between": 0.01}
    lengths |= {"evaluation": 0.1, "sample grid": 0.03, "checkpoint": 0.02, "adapter export": 0.01}
    died: Counter[str] = Counter()
    worst: dict[str, float] = {}
    runs, attempts, refused = 0, 0, 0
    current = folder / "killed-0"
    while True:
        marker.set("start")
        child = attempt(made, current, log)
        attempts += 1
        try:
            if sum(died.values()) < kills:
                where = kill_in(rng.choice(PHASES), child, marker, rng, lengths)
                died[where] += 1
                print(f"kill {sum(died.values())}: {where}", file=sys.stderr)
                if time.monotonic() > began + 60 * minutes:
                    kills = sum(died.values())
                continue
            if not refused:
                while marker.get() == "start":
                    time.sleep(0.001)
                refused += is_refused(made, current)
            os.waitpid(child, 0)
        except Ended:
            pass
        assert (current / "eval.json").exists(), log.read_text()[-3000:]
        for name, value in compare(folder / "whole", current).items():
            worst[name] = max(worst.get(name, 0.0), value)
        runs += 1
        if sum(died.values()) >= kills:
            break
        current = folder / f"killed-{runs}"
    return {
        "kills": sum(died.values()),
        "died_in": dict(sorted(died.items())),
        "runs_compared": runs,
        "attempts": attempts,
        "second_process_refused": bool(refused),
        "largest_difference": worst,
        "tolerance": TOLERANCE,
        "same": all(value <= TOLERANCE for value in worst.values()),
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
    }


def main() -> None:
    """Parse, soak, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=1e9, help="make no more kills after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(options.kills, options.minutes, options.seed, Path(folder))
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if options.json:
        options.json.write_text(text)
    sys.exit(0 if result["same"] else 1)


if __name__ == "__main__":
    main()
