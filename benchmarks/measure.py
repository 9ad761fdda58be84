"""Shared by the benchmarks: interleaved runs, ratios with intervals, peak memory, FLOPs, and the format of results.

Two ways of doing the same thing take turns, in a different order each time, and are compared repeat by repeat, so that
a machine that slows down half-way slows both. This file does not import the package, because workers in other
environments use it too.
"""

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

RESULTS = Path(__file__).parent / "results"
PEAK_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 FLOPs per second from the data sheets, by a part of the device's name; the first match counts."""


@dataclass(frozen=True)
class Seconds:
    """The duration of a run: wall clock, and CPU time of all threads of the process."""

    wall: float
    cpu: float


Side = Callable[[], Seconds]


def timed(run: Callable[[], Any], device: str = "cpu") -> Side:
    """A side that runs `run` in this process and waits for the device."""

    def side() -> Seconds:
        _wait(device)
        began, began_cpu = time.perf_counter(), time.process_time()
        run()
        _wait(device)
        return Seconds(time.perf_counter() - began, time.process_time() - began_cpu)

    return side


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(sides: Mapping[str, Side], *, repeats: int, warmup: int) -> dict[str, list[Seconds]]:
    """Run all sides in turn `repeats` times, after `warmup` uncounted turns; each turn starts with another side."""
    names = list(sides)
    taken: dict[str, list[Seconds]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = sides[name]()
            if turn >= warmup:
                taken[name].append(seconds)
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of above/below over repeats, with its 95 % interval from a bootstrap over repeats."""
    each = np.array(above) / np.array(below)
    drawn = np.random.default_rng(0).choice(each, (2000, len(each)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"ratio": _short(np.median(each)), "low": _short(low), "high": _short(high)}


def compare_seconds(ours: list[Seconds], other: list[Seconds], *, of: str = "other/ours", per: int = 1) -> dict:
    """A comparison for a result: medians in seconds, each divided by `per`, and the ratio of paired runs.

    With `of` = `other/ours`, the ratio is how many times faster ours is; with `ours/other`, how many times longer it
    takes.
    """
    pairs = {"ours": ours, "other": other}
    above, below = of.split("/")
    return {
        "unit": "s",
        "ours": _short(np.median([run.wall for run in ours]) / per),
        "other": _short(np.median([run.wall for run in other]) / per),
        **ratio([run.wall for run in pairs[above]], [run.wall for run in pairs[below]]),
        "of": of,
        "cpu_seconds": ratio([run.cpu for run in pairs[above]], [run.cpu for run in pairs[below]]),
        "repeats": len(ours),
    }


def compare_amounts(ours: float, other: float, *, unit: str, of: str = "ours/other") -> dict:
    """A comparison of two amounts that need no repeats: bytes, FLOPs."""
    share = ours / other if of == "ours/other" else other / ours
    return {"unit": unit, "ours": _short(ours), "other": _short(other), "ratio": _short(share), "of": of}


def _short(number: float) -> float:
    return float(f"{number:.5g}")


def flop_counter() -> FlopCounterMode:
    """torch's counter of matrix products, convolutions and attention, extended by attention on a CPU.

    It does not see the FLOPs of compiled or captured graphs.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        backward: lambda out, query, key, value, *_, **__: sdpa_backward_flop_count(out, query, key, value),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def flops_of(run: Callable[[], Any]) -> float:
    """FLOPs of one run."""
    with flop_counter() as counter:
        run()
    return float(counter.get_total_flops())


def peak_flops(device: str) -> float | None:
    """The GPU's dense bf16 peak in FLOPs per second; None for a CPU or a GPU that PEAK_BF16 does not list."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def resident_bytes(*, peak: bool = False) -> int:
    """The process's resident memory now, or its peak.

    Read from Linux's /proc, because in `getrusage` children inherit their parent's peak.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    field = "VmHWM" if peak else "VmRSS"
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


class PeakMemory:
    """Peak memory since construction: allocated on a GPU, or resident on a CPU, above the amount before."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        if self.on_gpu:
            torch.cuda.init()  # its counters exist only then
        self.before = torch.cuda.memory_allocated() if self.on_gpu else resident_bytes()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        """The peak so far."""
        return (torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes(peak=True)) - self.before


def allocator_peak(run: Callable[[], Any]) -> int:
    """The peak of the CPU allocator's memory during a run, above the amount before, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(max(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])))


def serve(step: Callable[[], Any], device: str) -> None:
    """Act as a worker (see Worker): carry out requests from stdin and answer each in JSON, until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # keep what libraries print out of the answers
    memory, side = PeakMemory(device), timed(step, device)
    for line in sys.stdin:
        task = line.strip()
        answer: Any = None
        if task == "step":
            seconds = side()
            answer = [seconds.wall, seconds.cpu]
        elif task == "flops":
            answer = flops_of(step)
        elif task == "peak":
            answer = memory.bytes()
        elif task == "software":
            answer = software()
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A side in a separate process, possibly in another environment, that works only on request."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, task: str) -> Any:
        """Send a request and return the answer; RuntimeError if the worker has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(task, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker ended with exit code {self.process.wait()}; its output is above")
        return json.loads(line)

    def step(self) -> Seconds:
        """One step in the worker, timed by it."""
        return Seconds(*self.ask("step"))

    def close(self) -> None:
        """Close stdin and wait for the worker to end."""
        self.process.communicate()


def in_fresh_process(*arguments: str) -> Any:
    """Run this script again with additional arguments, and return the JSON in its last line of output."""
    command = [sys.executable, *sys.argv, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: str = "cpu") -> str:
    """A description of this machine that does not identify it."""
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores" if os.cpu_count() != 1 else "1 core"
    return f"{_cpu_name()}, {cores}, {threads} thread{'s' * (threads > 1)} used, {pages / 2**30:.0f} GiB"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def software() -> dict[str, str]:
    """The versions that speed depends on."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def write_result(name: str, *, what: str, device: str, results: Path = RESULTS, **contents: Any) -> None:
    """Write results/<name>.json and print it. `contents` holds `comparisons` and any other figures."""
    words = sys.argv[1:]
    if "--results" in words:  # a path on somebody's machine
        at = words.index("--results")
        del words[at : at + 2]
    head = {
        "what": what,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "machine": machine(device),
        "load_average": round(os.getloadavg()[0], 1),
        "software": software(),
    }
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(head | contents, indent=1) + "\n"
    (results / f"{name}.json").write_text(text)
    print(text, end="")
