"""All goals on this CPU in one call: every measurement that has a goal, the main job and `check`, then the table.

    python benchmarks/goals.py [--budget 720] [--only check --only stack] [--toy]

Each part is a process of its own with a bound; the parts together stay within the budget. The main job comes last and
may take ten minutes in any case, so that it has a figure even if it misses its goal. Within a part, ours and the other
side take turns. Results are written as the parts end, so that a cut leaves what was done. Keep the machine quiet.
`--toy` runs every part as small as it can be, which measures nothing.
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
    "ceiling": Part("ceiling.py", "--threads 1 --threads 2 --repeats 5", "--threads 1 --repeats 1", 90),
    "ceiling negatives 1": Part(
        "ceiling.py",
        "--agsm negatives=1 --tag _negatives_1 --repeats 3",
        "--agsm negatives=1 --tag _negatives_1 --threads 1 --repeats 1",
        60,
    ),
    "ddpo": Part("ddpo_step.py", "--repeats 7", "--repeats 1 --images 2 --num-steps 2", 110),
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


def check_seconds(log: Path, *, starts: int, bound: float) -> tuple[float, str]:
    """The median wall-clock seconds of `check`, and what was wrong."""
    taken = []
    for _ in range(starts):
        seconds, wrong = run([sys.executable, "-m", "agsm_rl", "check", MAIN_JOB], seconds=bound, log=log)
        if wrong:
            return 0.0, wrong
        taken.append(seconds)
    return statistics.median(taken), ""


def main_job_seconds(folder: Path, log: Path, *, toy: bool, bound: float) -> tuple[float, str]:
    """The seconds of the main job with an empty cache, so that it also evaluates the base, and what was wrong."""
    small = ["--set", "steps=2", "--set", "evaluate.num_images=4", "--set", "evaluate.guidance=[1.0]"] if toy else []
    command = [sys.executable, "-m", "agsm_rl", "train", MAIN_JOB, "--run-dir", str(folder / "run"), *small]
    return run(command, seconds=bound, log=log, AGSM_RL_CACHE=str(folder / "cache"))


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
    only: Annotated[list[str], typer.Option(help=f"of {', '.join(PARTS)}, check, main job")] = [],  # noqa: B006
    toy: Annotated[bool, typer.Option(help="a trial of every part, with results in a temporary folder")] = False,
    results: Path = measure.RESULTS,
) -> None:
    """Measure all, write the table and print what was reached."""
    chosen = only or [*PARTS, "check", "main job"]
    unknown = set(chosen) - {*PARTS, "check", "main job"}
    if unknown:
        raise typer.BadParameter(f"--only {sorted(unknown)[0]}: one of {', '.join(PARTS)}, check, main job")
    folder = Path(tempfile.mkdtemp(prefix="goals-"))
    results = folder / "results" if toy else results
    results.mkdir(parents=True, exist_ok=True)
    if "ddpo" in chosen and (wrong := prepare_trl(folder / "environments.txt")):
        print(f"environments: {wrong}; what is compared with other trainers will fail", flush=True)
    ends = time.monotonic() + budget

    def bound(seconds: float) -> float:
        return max(1.0, min(seconds, ends - time.monotonic()))

    began, since = time.monotonic(), time.time()
    for name in [name for name in PARTS if name in chosen]:
        part = PARTS[name]
        words = [*(part.toy if toy else part.arguments).split(), "--results", str(results)]
        log = folder / f"{name.replace(' ', '_')}.txt"
        limit = bound(900 if toy else part.seconds)
        report(name, *run([sys.executable, str(HERE / part.script), *words], seconds=limit, log=log))
    figures: dict[str, Any] = {}
    if "check" in chosen:
        seconds, wrong = check_seconds(
            folder / "check.txt", starts=1 if toy else STARTS, bound=bound(900 if toy else 60)
        )
        report("check", seconds, wrong)
        figures |= {} if wrong else {"check": amount(seconds)}
    if "main job" in chosen:
        seconds, wrong = main_job_seconds(folder, folder / "main_job.txt", toy=toy, bound=max(600.0, bound(900)))
        report("main job", seconds, wrong)
        figures |= {} if wrong else {"main job": amount(seconds, children_cpu() - before)}
    if figures:
        what = f"the median of {STARTS} starts of `check`, and one main job with an empty cache, both of {MAIN_JOB}"
        measure.write_result("goals_cpu", what=what, device="cpu", results=results, comparisons=figures)
    if results == measure.RESULTS:
        table.main()
    if not toy:
        print(*table.goals(results, since=since), sep="\n")
    print(f"{time.monotonic() - began:.0f} s in all; the parts' output is in {folder}")
    shutil.rmtree(folder / "run", ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
