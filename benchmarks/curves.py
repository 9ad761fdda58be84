"""How the time of a step grows with batch, prompts per image, soft tokens, sampling steps and processes.

    python benchmarks/curves.py [--repeats 3] [--toy] [--threads 1]       about 4 minutes on an idle machine
    uv run benchmarks/plot_curves.py docs/scale_curves.png

Measured on the embedded base. Each point is the median of `repeats` steps after one warm-up step; a curve varies one
thing only. The figures go to benchmarks/results/curves.json. `exponent` is the slope of log seconds over the log of
what varies: 1 is linear. Processes are started with `accelerate launch`, as users do, each with `threads` threads.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from agsm_rl_rewards.brightness import Brightness
from measure import write_result

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.rollouts import Rollouts

BASE = "builtin:shapes-sd15"


@dataclass(frozen=True)
class Setting:
    """A kind of step: AGSM on `batch` pairs in groups of `group_size`, or DDPO on `batch` images of `num_steps`."""

    objective: Literal["agsm", "ddpo"] = "agsm"
    batch: int = 16
    group_size: int = 4
    num_tokens: int = 4
    num_steps: int = 10

    def trainer(self) -> Trainer:
        """A trainer on the embedded base; batches are totals over the processes."""
        backbone = load_backbone(BASE, device="cpu")
        policy = Policy(backbone, {"tokens": SoftTokens(num_tokens=self.num_tokens), "lora": LoRA(rank=8, banks=2)})
        if self.objective == "agsm":
            source = Pairs("builtin:shapes", self.batch, num_images=2 * self.batch)
            term = Term(AGSM(group_size=self.group_size), source, name="agsm")
        else:
            drawn = Rollouts(
                "builtin:shapes-prompts", [(Brightness(), 1.0)], num_prompts=self.batch // 2, images_per_prompt=2,
                num_steps=self.num_steps, guidance=1.0,
            )  # fmt: skip
            term = Term(DDPO(), drawn, name="ddpo")
        return Trainer(policy, [term], steps=10**6)


@dataclass(frozen=True)
class Curve:
    """Varies `vary` over `values` in `base`. For `processes`, the batch is `fixed` or grows `with processes`."""

    name: str
    vary: str
    values: tuple[int, ...]
    base: Setting
    batch: Literal["fixed", "with processes"] = "fixed"


def curves(toy: bool) -> list[Curve]:
    """All curves; the `toy` ones only show that everything runs."""
    agsm, ddpo = Setting(), Setting(objective="ddpo", batch=8)
    if toy:
        small = replace(agsm, batch=4, group_size=2)
        return [
            Curve("batch", "batch", (2, 4), replace(small, batch=2)),
            Curve("processes, batch fixed", "processes", (1, 2), small),
        ]
    cores = len(os.sched_getaffinity(0))
    counts = tuple(count for count in (1, 2, 4, 8) if count <= cores)
    return [
        Curve("batch (AGSM pairs)", "batch", (4, 8, 16, 32), agsm),
        Curve("prompts per image (group_size)", "group_size", (2, 4, 8, 16), agsm),
        Curve("soft tokens", "num_tokens", (1, 4, 16, 64), replace(agsm, batch=8)),
        Curve("batch (DDPO images)", "batch", (2, 4, 8, 16), ddpo),
        Curve("sampling steps (DDPO)", "num_steps", (5, 10, 20, 40), replace(ddpo, batch=4)),
        Curve("processes, batch fixed", "processes", counts, agsm),
        Curve("processes, batch grows", "processes", counts, replace(agsm, batch=8), "with processes"),
    ]


def seconds_of(setting: Setting, repeats: int) -> list[float]:
    """Wall-clock seconds of each step after a warm-up step, as this process measures them."""
    trainer = setting.trainer()
    seconds = []
    for turn in range(1 + repeats):
        trainer.processes.wait()
        began = time.perf_counter()
        trainer.run_step()
        if turn:
            seconds.append(time.perf_counter() - began)
    return seconds


def launched(setting: Setting, count: int, repeats: int, threads: int) -> list[float]:
    """The first process's seconds, when accelerate's launcher starts `count` processes on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        options = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
        options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        worker = [__file__, "worker", json.dumps(asdict(setting)), str(repeats), str(threads), str(out)]
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *options, *worker],
            check=True,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)},
        )
        return list(json.loads(out.read_text()))


def measure(curve: Curve, repeats: int, threads: int) -> dict[str, Any]:
    """A curve's points and its exponent."""
    points = []
    for value in curve.values:
        if curve.vary == "processes":
            grown = curve.base.batch * (value if curve.batch == "with processes" else 1)
            setting = replace(curve.base, batch=grown)
            # accelerate's launcher needs two processes or more.
            seconds = launched(setting, value, repeats, threads) if value > 1 else seconds_of(setting, repeats)
        else:
            setting = replace(curve.base, **{curve.vary: value})
            seconds = seconds_of(setting, repeats)
        points.append({curve.vary: value, "seconds": round(median(seconds), 4), "all": [round(s, 4) for s in seconds]})
        print(curve.name, points[-1], flush=True)
    logs = [[np.log(point[key]) for point in points] for key in (curve.vary, "seconds")]
    exponent = float(np.polyfit(*logs, 1)[0]) if len(points) > 1 else None
    return {
        "name": curve.name,
        "vary": curve.vary,
        "exponent": exponent,
        "setting": asdict(curve.base),
        "points": points,
    }


app = typer.Typer()


@app.command()
def worker(setting: str, repeats: int, threads: int, out: Path) -> None:
    """One of the processes for a point; started by `launched`."""
    torch.set_num_threads(threads)
    seconds = seconds_of(Setting(**json.loads(setting)), repeats)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(seconds))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="threads per process")] = 1,
    toy: Annotated[bool, typer.Option("--toy", help="tiny settings; writes curves_toy.json")] = False,
) -> None:
    """Measure all curves and record them."""
    if context.invoked_subcommand:
        return
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    began = time.perf_counter()
    measured = [measure(curve, repeats, threads) for curve in curves(toy)]
    write_result(
        "curves_toy" if toy else "curves",
        what=f"seconds of a step on {BASE}, soft tokens and LoRA of rank 8 with two banks, {threads} thread(s) each",
        device="cpu",
        minutes=round((time.perf_counter() - began) / 60, 1),
        curves=measured,
    )


if __name__ == "__main__":
    app()
