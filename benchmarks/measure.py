"""What the benchmarks share: runs taken in turn, ratios with intervals, peak memory, FLOPs, and the results' form.

Two ways of doing one thing are run one after the other, again and again, each time in another order, and compared
repeat by repeat: a machine that becomes slower half-way then slows both. The package itself is not imported here,
because the workers that run in another environment use this file too.
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
"""Dense bf16 FLOPs a second by the makers' data sheets, by a part of the device's name; the first that fits counts."""


@dataclass(frozen=True)
class Seconds:
    """What a run took: by the clock, and of all the process's threads."""

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
    """Run all sides in turn `repeats` times, after `warmup` turns that do not count; the first changes each time."""
    names = list(sides)
    found: dict[str, list[Seconds]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = sides[name]()
            if turn >= warmup:
                found[name].append(seconds)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of above/below over repeats, and a 95 % interval of that median by bootstrap over repeats."""
    each = np.array(above) / np.array(below)
    drawn = np.random.default_rng(0).choice(each, (2000, len(each)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"ratio": _short(np.median(each)), "low": _short(low), "high": _short(high)}


def compare_seconds(ours: list[Seconds], other: list[Seconds], *, of: str = "other/ours", per: int = 1) -> dict:
    """A comparison for a result: medians in seconds (each divided by `per`), and the ratio of paired runs.

    of: `other/ours` says how many times faster ours is, `ours/other` how many times longer it takes.
    """
    pairs = {"ours": ours, "other": other}
    above, below = of.split("/")
    return {
        "unit": "s",
        "ours": _short(np.median([one.wall for one in ours]) / per),
        "other": _short(np.median([one.wall for one in other]) / per),
        **ratio([one.wall for one in pairs[above]], [one.wall for one in pairs[below]]),
        "of": of,
        "cpu_seconds": ratio([one.cpu for one in pairs[above]], [one.cpu for one in pairs[below]]),
        "repeats": len(ours),
    }


def compare_amounts(ours: float, other: float, *, unit: str, of: str = "ours/other") -> dict:
    """A comparison of two amounts that need no repeats: bytes, FLOPs."""
    found = ours / other if of == "ours/other" else other / ours
    return {"unit": unit, "ours": _short(ours), "other": _short(other), "ratio": _short(found), "of": of}


def _short(number: float) -> float:
    return float(f"{number:.5g}")


def flop_counter() -> FlopCounterMode:
    """torch's counter of matrix products, convolutions and attention, with a CPU's attention added.

    FLOPs that a compiled or captured graph does are not seen by it.
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
    """The GPU's dense bf16 peak, FLOPs a second; None for a CPU and for what PEAK_BF16 does not know."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def resident_bytes(*, peak: bool = False) -> int:
    """The process's resident memory now, or the most that it ever was.

    Linux's own record of it, because `getrusage` hands a parent's peak on to its children.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    field = "VmHWM" if peak else "VmRSS"
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


class PeakMemory:
    """The most that is held from its construction on: allocated on a GPU, resident on a CPU above what was before."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.before = torch.cuda.memory_allocated() if self.on_gpu else resident_bytes()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        """So far."""
        return (torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes(peak=True)) - self.before


def allocator_peak(run: Callable[[], Any]) -> int:
    """The most that the CPU's allocator gave out during a run, beyond what was there before; by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(max(np.cumsum([event.nbytes() for event in sorted(events, key=lambda one: one.start_ns())])))


def serve(step: Callable[[], Any], device: str) -> None:
    """Be a worker: run `step` whenever told to on stdin and answer in JSON, until stdin ends; see Worker."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer
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
    """A side in its own process, possibly in another environment; it works only on request."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, task: str) -> Any:
        """What the worker answers; RuntimeError when it has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(task, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker ended with exit code {self.process.wait()}; what it said is above")
        return json.loads(line)

    def step(self) -> Seconds:
        """One step over there, by its own clock."""
        return Seconds(*self.ask("step"))

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def in_fresh_process(*arguments: str) -> Any:
    """What this script prints last, in JSON, when it is called anew with more arguments."""
    command = [sys.executable, *sys.argv, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: str = "cpu") -> str:
    """This machine in words; nothing that names it."""
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
    """Versions that speed depends on."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def write_result(name: str, *, what: str, device: str, results: Path = RESULTS, **contents: Any) -> None:
    """Write results/<name>.json and show it. `contents`: `comparisons` and whatever else was found."""
    words = sys.argv[1:]
    if "--results" in words:  # a folder of somebody's machine
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
