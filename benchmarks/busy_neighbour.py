"""AGSM's step on a quiet machine and beside busy processes: as commands run it, against ways of using threads.

    python benchmarks/busy_neighbour.py [--neighbours 1] [--seconds 6] [--rounds 3] [--spin COUNT]...

Each side is a process of its own that steps for some seconds when it is its turn. `before` is torch left to itself;
`passive` and `one thread` are what users can set; `ours` is what `agsm-rl train` does (agsm_rl/threads.py), and its
time beside a neighbour includes the first seconds, in which it finds out. A neighbour is a Python process that counts.
Each round is measured on a quiet machine, after some uncounted seconds in which threads may come back, and beside
neighbours; `quiet` and `busy` compare ours with `before` when quiet. Start it on an otherwise idle machine:
`cores_idle_before` in the result says whether it was.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import measure
import torch
import typer
from agsm_step import make_policy

from agsm_rl import Term, Trainer, threads
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.sources.pairs import Pairs

SPIN = "GOMP_SPINCOUNT"
SIDES = {
    "before": {SPIN: "300000"},  # what libgomp does by itself
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "ours": {SPIN: os.environ.get(SPIN, "")},  # as set by agsm_rl
}
SETTLING = 0.5
"""Seconds between the start of a neighbour and a turn."""
UNCOUNTED = 5.0
"""Seconds of steps before a turn on a quiet machine."""


def serve() -> None:
    """Act as a side: for each pair of numbers on stdin, step for that many seconds, and as many that are counted.

    Each is answered with the figures of the counted steps.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    source = Pairs("builtin:shapes", 4, num_images=64)
    trainer = Trainer(make_policy("embedded", "cpu"), [Term(AGSM(group_size=4), source, name="agsm")], steps=1)
    for line in sys.stdin:
        uncounted, counted = map(float, line.split())
        began = time.perf_counter()
        trainer.run_step()  # its threads have slept
        while time.perf_counter() - began < uncounted:
            trainer.run_step()
        longest, taken, began, began_cpu = 0.0, [], time.perf_counter(), time.process_time()
        while not taken or time.perf_counter() - began < counted:
            started = time.perf_counter()
            trainer.run_step()
            taken.append(time.perf_counter() - started)
            longest = max(longest, taken[-1])
        answer = {
            "step": (time.perf_counter() - began) / len(taken),
            "cpu": (time.process_time() - began_cpu) / len(taken),
            "longest": longest,
            "steps": len(taken),
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(answer), file=answers, flush=True)


class Side(measure.Worker):
    """A side's process, with its environment."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        unset = {SPIN, "OMP_WAIT_POLICY", *threads.NUMBERS, threads.MODE}
        rest = {key: value for key, value in os.environ.items() if key not in unset}
        command = [sys.executable, __file__, "--side", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=rest | environment
        )

    def turn(self, seconds: float, *, uncounted: float = 0.0) -> dict[str, float]:
        """Its figures of so many seconds of steps, after others that do not count."""
        return dict(self.ask(f"{uncounted} {seconds}"))


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Within the block, so many processes count."""
    counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(SETTLING)
    try:
        yield
    finally:
        for process in counting:
            process.kill()
            process.wait()


def cores_idle(seconds: float = 2.0) -> float:
    """The number of cores that are idle while this process sleeps."""
    cores = threads.allowed_cores()
    before = threads.idle_seconds(cores)
    time.sleep(seconds)
    after = threads.idle_seconds(cores)
    return round((after - before) / seconds, 2) if before is not None and after is not None else float("nan")


def take_turns(sides: dict[str, Side], count: int, seconds: float, first: int) -> dict[str, dict[str, float]]:
    """The figures of every side beside so many neighbours; another side begins each time."""
    names = [*sides][first % len(sides) :] + [*sides][: first % len(sides)]
    figures = {}
    for name in names:
        with neighbours(count):
            figures[name] = sides[name].turn(seconds, uncounted=0.0 if count else UNCOUNTED)
    return figures


def compare(above: list[dict[str, float]], below: list[dict[str, float]]) -> dict[str, Any]:
    """A comparison for the result: how many times as long `above` takes for a step."""
    ours, other = ([turn["step"] for turn in turns] for turns in (above, below))
    median = {name: sorted(values)[len(values) // 2] for name, values in (("ours", ours), ("other", other))}
    return {"unit": "s", **median, **measure.ratio(ours, other), "of": "ours/other", "repeats": len(ours)}


def main(
    neighbour_count: Annotated[int, typer.Option("--neighbours", min=1)] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="per turn")] = 6.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    spin: Annotated[list[int], typer.Option(help="further sides that spin so often")] = [],  # noqa: B006 - typer's way
    results: Path = measure.RESULTS,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure and record."""
    if side is not None:
        if side == "ours":
            threads.follow_free_cores()
        serve()
        return
    idle = cores_idle()
    more = {f"spin {count}": {SPIN: str(count)} for count in spin}
    sides = {name: Side(name, environment) for name, environment in (SIDES | more).items()}
    for worker in sides.values():
        worker.turn(0)  # everything is loaded
    quiet, busy = [], []
    for turn in range(rounds):
        quiet.append(take_turns(sides, 0, seconds, turn))
        busy.append(take_turns(sides, neighbour_count, seconds, turn))
    for worker in sides.values():
        worker.close()
    before = [turn["before"] for turn in quiet]
    measure.write_result(
        "busy_neighbour",
        what=f"AGSM's step, quiet and beside {neighbour_count} busy process{'es' * (neighbour_count > 1)}",
        device="cpu",
        results=results,
        cores_idle_before=idle,
        spin=os.environ.get(SPIN),
        comparisons={
            "quiet": compare([turn["ours"] for turn in quiet], before),
            "busy": compare([turn["ours"] for turn in busy], before),
            "busy, before": compare([turn["before"] for turn in busy], before),
        },
        turns={
            name: {"quiet": [turn[name] for turn in quiet], "busy": [turn[name] for turn in busy]} for name in sides
        },
    )


if __name__ == "__main__":
    typer.run(main)
