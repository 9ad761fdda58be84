"""The goals on this CPU in one call: every measurement that has one, the main job and `check`, then the table.

    python benchmarks/goals.py [--budget 720] [--only check --only stack] [--toy]

Each part is a process of its own with a bound; the parts together stay within the budget. The main job comes last and
may take ten minutes in any case, so that it has a figure even if it misses its goal. Within a part, ours and the other
side take turns. Results are written as the parts end, so that a cut leaves what was done. Keep the machine quiet.
busy_neighbour.py is not among them: it needs minutes of a machine that is otherwise idle. `--toy` runs every part as
small as it can be, which measures nothing.
"""

import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import measure
import table
import typer

HERE = Path(__file__).parent
ROOT = HERE.parent
MAIN_JOB = "recipes/agsm_plus_ddpo.yaml"
STARTS = 5
MAIN_JOB_BOUND = 600.0
"""Seconds that the main job may take whatever is left of the budget."""


@dataclass(frozen=True)
class Part:
    """A script with its arguments, those of a trial, and the seconds that it may take."""

    script: str
    arguments: str
    toy: str
    seconds: int


PARTS = {
    "agsm": Part("agsm_step.py", "--repeats 15", "--repeats 1 --warmup 0", 90),
    "agsm negatives 1": Part(
        "agsm_step.py",
        "--agsm negatives=1 --tag _negatives_1 --repeats 15",
        "--agsm negatives=1 --tag _negatives_1 --repeats 1 --warmup 0 --no-memory",
        90,
    ),
    "agsm compiled": Part(
        "agsm_step.py",
        "--compile default --tag _compiled --warmup 6 --repeats 15 --no-memory",
        "--compile default --tag _compiled --repeats 1 --warmup 0 --no-memory",
        180,
    ),
    "agsm in passes": Part(
        "agsm_step.py",
        "--agsm images_per_pass=2 --tag _images_per_pass_2 --repeats 15",
        "--agsm images_per_pass=2 --tag _images_per_pass_2 --repeats 1 --warmup 0",
        90,
    ),
    "ceiling": Part("ceiling.py", "--threads 1 --threads 2 --repeats 5", "--threads 1 --repeats 1", 90),
    "ceiling negatives 1": Part(
        "ceiling.py",
        "--agsm negatives=1 --tag _negatives_1 --threads 2 --repeats 3",
        "--agsm negatives=1 --tag _negatives_1 --threads 1 --repeats 1",
        60,
    ),
    "ddpo": Part("ddpo_step.py", "--repeats 7", "--repeats 1 --images 2 --num-steps 2", 110),
    "flow_grpo": Part(
        "flow_grpo_step.py",
        "--prompts 2 --num-steps 6 --repeats 5",
        "--repeats 1 --prompts 1 --group-size 2 --num-steps 2",
        140,
    ),
    "stack": Part("stack.py", "--repeats 3", "--repeats 1 --warmup 0 --num-prompts 4", 100),
    "sampling": Part("sampling.py", "--repeats 13 --warmup 1", "--repeats 1 --warmup 0 --images 1 --num-steps 2", 80),
}
"""In this order; `check` and the main job follow."""


def run(command: list[str], *, seconds: float, log: Path, **variables: str) -> tuple[float, str]:
    """Run a command with its output in a file; the wall-clock seconds it took, and what was wrong ("" if nothing)."""
    began = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            wrong = f"exit code {code}; see {log}" if code else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
            wrong = f"cut after {seconds:.0f} s"
    return time.perf_counter() - began, wrong


def amount(seconds: float, cpu: float) -> dict[str, Any]:
    """A duration as a comparison without another side, with the CPU seconds that it took."""
    return {"unit": "s", "ours": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def children_cpu() -> float:
    """CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check(folder: Path, *, toy: bool, bound: float) -> tuple[list[float], str]:
    """The wall-clock seconds of several starts of `check`, and what was wrong."""
    taken = []
    for _ in range(1 if toy else STARTS):
        command = [sys.executable, "-m", "agsm_rl", "check", MAIN_JOB]
        seconds, wrong = run(command, seconds=bound, log=folder / "check.txt")
        if wrong:
            return [], wrong
        taken.append(seconds)
    return taken, ""


def main_job(folder: Path, *, toy: bool, bound: float) -> tuple[list[float], str]:
    """The seconds of the main job with an empty cache, so that it also evaluates the base, and what was wrong."""
    changes = [
        "steps=2",
        "evaluate.num_images=4",
        "objectives.0.weight={0: 1, 1: 0}",
        "objectives.1.weight={0: 0, 1: 1}",
    ]
    small = [word for change in changes for word in ("--set", change)] if toy else []
    command = [sys.executable, "-m", "agsm_rl", "train", MAIN_JOB, "--run-dir", str(folder / "run"), *small]
    cache = {"AGSM_RL_CACHE": str(folder / "cache")}
    seconds, wrong = run(command, seconds=max(MAIN_JOB_BOUND, bound), log=folder / "main_job.txt", **cache)
    return [seconds], wrong


COMMANDS = {"check": check, "main job": main_job}
WHAT = {
    "check": f"the median of {STARTS} starts of `agsm-rl check {MAIN_JOB}`",
    "main job": f"`agsm-rl train {MAIN_JOB}` with an empty cache",
}


def measure_command(name: str, folder: Path, results: Path, *, toy: bool, bound: float) -> None:
    """Time a command and write its result."""
    began, cpu = time.perf_counter(), children_cpu()
    taken, wrong = COMMANDS[name](folder, toy=toy, bound=bound)
    report(name, time.perf_counter() - began, wrong)
    if not wrong:
        figures = amount(statistics.median(taken), (children_cpu() - cpu) / len(taken))
        words = {"what": WHAT[name], "device": "cpu", "results": results}
        measure.write_result(f"{name.replace(' ', '_')}_cpu", **words, comparisons={name: figures})


def prepare_trl(log: Path) -> str:
    """Create the environments of other trainers, which takes minutes the first time; what was wrong."""
    made = "import sys; from pathlib import Path; from agsm_rl_rewards.worker.environment import python_for; "
    made += "[python_for(Path(name)) for name in sys.argv[1:]]"
    workers = [str(file) for file in sorted(HERE.glob("*_worker.py")) if file.with_suffix(".lock").is_file()]
    return run([sys.executable, "-c", made, *workers], seconds=900, log=log)[1]


def report(name: str, seconds: float, wrong: str) -> None:
    """A line for a part."""
    print(f"{name:20} {seconds:6.0f} s  {wrong or 'done'}", flush=True)


def main(
    budget: Annotated[float, typer.Option(help="seconds for all parts; environments are made before")] = 720.0,
    only: Annotated[list[str], typer.Option(help=f"of {', '.join((*PARTS, *COMMANDS))}")] = [],  # noqa: B006
    toy: Annotated[bool, typer.Option(help="a trial of every part, with results in a temporary folder")] = False,
    results: Path = measure.RESULTS,
) -> None:
    """Measure all, write the table and print what was reached."""
    known = [*PARTS, *COMMANDS]
    chosen = only or known
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise typer.BadParameter(f"--only {unknown[0]}: one of {', '.join(known)}")
    folder = Path(tempfile.mkdtemp(prefix="goals-"))
    results = folder / "results" if toy else results
    results.mkdir(parents=True, exist_ok=True)
    if "ddpo" in chosen and (wrong := prepare_trl(folder / "environments.txt")):
        print(f"environments: {wrong}; what is compared with other trainers will fail", flush=True)
    print(f"{measure.machine()}, load {os.getloadavg()[0]:.1f}", flush=True)
    began, since = time.monotonic(), time.time()

    def bound(seconds: float) -> float:
        return max(1.0, min(seconds, began + budget - time.monotonic()))

    for name in [name for name in PARTS if name in chosen]:
        part = PARTS[name]
        words = [*(part.toy if toy else part.arguments).split(), "--results", str(results)]
        log, limit = folder / f"{name.replace(' ', '_')}.txt", bound(3000 if toy else part.seconds)
        report(name, *run([sys.executable, str(HERE / part.script), *words], seconds=limit, log=log))
    for name in [name for name in COMMANDS if name in chosen]:
        measure_command(name, folder, results, toy=toy, bound=bound(900))
    if results == measure.RESULTS:
        table.main()
    if not toy:
        print(*table.goals(results, since=since), sep="\n")
    print(f"{time.monotonic() - began:.0f} s in all; the parts' output is in {folder}")
    shutil.rmtree(folder / "run", ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
