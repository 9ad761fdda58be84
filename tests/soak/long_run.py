"""Many steps in one process: memory stays flat, and neither files nor processes are left open.

    python tests/soak/long_run.py --steps 10000 --json tests/soak/results/long_run.json

AGSM on pairs and DDPO on its own rollouts over soft tokens and LoRA on the tiny pipeline, through what `agsm-rl train`
calls, with metrics, TensorBoard, checkpoints and sample grids. Resident memory, file handles and child processes are
read from /proc each 100 steps; growth is the mean of the last tenth over the mean of the tenth after warm-up (the first
fifth of the steps). Ends with exit code 1 where memory grew by more than 2 % or anything is left behind.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_pipelines import save_tiny

from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.callbacks import MetricsWriter
from agsm_rl.run.lifecycle import train

LIMIT = 0.02


def recipe(base: Path, steps: int) -> Recipe:
    """Small batches: the number of steps is what matters."""
    own = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"jpeg_incompressibility": 1.0}}
    own |= {"num_prompts": 2, "images_per_prompt": 2, "num_steps": 2, "guidance": 1.0, "updates": 2}
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2, "num_images": 64}
    return Recipe.from_data(
        {
            "steps": steps,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(base), "device": "cpu"},
            "adapters": {"tokens": {"use": "soft_tokens"}, "lora": {"use": "lora", "rank": 2, "banks": 2}},
            "objectives": [{"use": "agsm", "group_size": 2, "source": pairs}, {"use": "ddpo", "source": own}],
            "optimizer": {"learning_rate": 1e-5},
            "sample": {"every": 500, "num_images": 2, "num_steps": 2, "prompts": ["a red star"]},
            "checkpoint": {"every": 250, "keep": 2},
            "track": ["tensorboard"],
        }
    )


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def handles() -> list[str]:
    """What this process has open, without pipes and sockets' numbers."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except OSError:
            continue
    return sorted(found)


def children() -> list[str]:
    """Processes that this one started and that are still there."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def soak(steps: int, minutes: float, folder: Path) -> dict[str, Any]:
    """Train, at most so long, and what was measured on the way."""
    every = max(1, min(100, steps // 20))
    memory: dict[int, int] = {}
    open_files: dict[int, int] = {}
    on_step = MetricsWriter.on_step

    def measured(metrics: MetricsWriter, trainer: Any, step: int, figures: dict[str, float]) -> None:
        on_step(metrics, trainer, step, figures)
        if step % every == 0:
            memory[step], open_files[step] = resident(), len(handles())
        if time.monotonic() > began + 60 * minutes:
            trainer.stopping = True

    MetricsWriter.on_step = measured  # type: ignore[method-assign]
    base = save_tiny("sd15", folder / "base")
    made = recipe(base, steps)
    before, began = handles(), time.monotonic()
    train(made, folder / "run", console=Console(file=StringIO()))
    gc.collect()
    left = [name for name in handles() if str(folder / "run") in name]
    marks = sorted(memory)
    asked, steps = steps, marks[-1] if marks else 0
    if len(marks) < 10:
        sys.exit(f"only {steps} steps in that time: too few to tell growth from warm-up; give it more --minutes")
    warm = [memory[mark] for mark in marks if steps * 0.2 < mark <= steps * 0.3]
    last = [memory[mark] for mark in marks if mark > steps * 0.9]
    growth = mean(last) / mean(warm) - 1
    return {
        "steps": steps,
        "steps_asked_for": asked,
        "seconds": round(time.monotonic() - began),
        "memory_mib": {str(mark): round(memory[mark] / 2**20, 1) for mark in marks if mark % (every * 10) == 0},
        "memory_after_warm_up_mib": round(mean(warm) / 2**20, 1),
        "memory_at_the_end_mib": round(mean(last) / 2**20, 1),
        "growth": round(growth, 5),
        "limit": LIMIT,
        "file_handles": {"before": len(before), "first": open_files[marks[0]], "last": open_files[marks[-1]]},
        "handles_left": left,
        "processes_left": len(children()),
        "flat": growth <= LIMIT and not left and not children() and open_files[marks[-1]] <= open_files[marks[0]],
        "torch": torch.__version__,
    }


def main() -> None:
    """Parse, soak, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after the step in which so many are over")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(options.steps, options.minutes, Path(folder))
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if options.json:
        options.json.write_text(text)
    sys.exit(0 if result["flat"] else 1)


if __name__ == "__main__":
    main()
