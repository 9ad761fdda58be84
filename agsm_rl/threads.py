"""How many threads torch computes with on the CPU: as many as cores are free, looked at again while a command runs.

OpenMP's threads meet after every operation. Where another process takes the core of one of them, all the others wait
for it, thousands of times a step: beside one busy process, two threads on two cores took more than 30 times as long as
alone, and one thread 1.5 times. So commands use the cores that they have themselves or that are idle. What they compute
differs by rounding only; a number that the user fixes (OMP_NUM_THREADS) is kept.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agsm_rl.errors import UserError

logger = logging.getLogger(__name__)
MODE = "AGSM_RL_THREADS"
"""`auto`: at most OMP_NUM_THREADS threads, fewer while cores are taken; `fixed`: the same number to the end."""
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Where users, and launchers, give the number of threads."""
WINDOW = 0.5
"""Seconds over which free cores are averaged; Linux counts in hundredths."""
LOST, GAINED = 0.35, 0.85
"""By how many cores the free ones must be below the number of threads to lower it, and above it to raise it."""
WINDOWS_TO_LOWER, WINDOWS_TO_RAISE = 2, 6
"""How many windows in a row must say so: a short burst is waited out, and a core is taken back with caution."""


@dataclass(frozen=True)
class Reading:
    """Seconds on three clocks: the wall's, this process's on all cores, and what its cores have been idle in total."""

    wall: float
    own: float
    idle: float

    def free_since(self, earlier: Reading) -> float:
        """The mean number of cores, in between, that this process used or nobody did."""
        return (self.own - earlier.own + self.idle - earlier.idle) / (self.wall - earlier.wall)


class FreeCores:
    """Lowers and raises a number of threads by readings, never above `limit`."""

    def __init__(self, limit: int, first: Reading) -> None:
        self.limit = self.threads = limit
        self._last = first
        self._wanted: list[int] = []

    def look(self, now: Reading, *, at_once: bool = False) -> bool:
        """Take a reading into account, if a window has passed; whether the number of threads has changed.

        at_once: decide by this window alone, as at the beginning.
        """
        if now.wall - self._last.wall < WINDOW:
            return False
        self._wanted.append(wanted(self.threads, self.limit, now.free_since(self._last)))
        self._last = now
        lower = [number < self.threads for number in self._wanted[-WINDOWS_TO_LOWER:]]
        higher = [number > self.threads for number in self._wanted[-WINDOWS_TO_RAISE:]]
        if (at_once and lower[-1]) or (all(lower) and len(lower) == WINDOWS_TO_LOWER):
            self.threads = self._wanted[-1]
        elif all(higher) and len(higher) == WINDOWS_TO_RAISE:
            self.threads = min(self._wanted[-WINDOWS_TO_RAISE:])
        else:
            del self._wanted[:-WINDOWS_TO_RAISE]
            return False
        self._wanted.clear()
        return True


def wanted(threads: int, limit: int, free: float) -> int:
    """The number of threads for this mean number of free cores; the same as now where that fits about as well."""
    if free < threads - LOST:
        return max(1, int(free + LOST))
    if free > threads + GAINED:
        return min(limit, int(free + 1 - GAINED))
    return threads


_first: Reading | None = None
"""When following began; None while no command follows."""
_cores: FreeCores | None = None
_next_look = float("inf")
_has_told = False


def follow_free_cores() -> None:
    """From now on, compute with as many threads as cores are free; commands call it before they load torch.

    Nothing is followed where the user fixed the number, or the system does not say which cores are idle. UserError for
    an AGSM_RL_THREADS that is neither `auto` nor `fixed`.
    """
    global _first, _cores, _next_look
    _first, _cores, _next_look = (read() if is_followed() else None), None, float("inf")
    if _first is not None:
        _next_look = 0.0


def is_followed() -> bool:
    """Whether the environment leaves the number of threads open.

    OMP_NUM_THREADS fixes it, except under a launcher (accelerate, torchrun), which sets that variable by itself.
    """
    mode = os.environ.get(MODE, "")
    if mode not in ("", "auto", "fixed"):
        raise UserError(
            f"{MODE}: got '{mode}'; write auto (fewer threads while other processes take this machine's cores) or "
            "fixed (the same number to the end). OMP_NUM_THREADS is the number."
        )
    if mode:
        return mode == "auto"
    return "LOCAL_RANK" in os.environ or not any(os.environ.get(name) for name in NUMBERS)


def adjust() -> None:
    """Look at the free cores if it is time to, and tell torch; called before each prediction.

    It must be called by the thread that predicts: OpenMP keeps the number for each thread.
    """
    global _cores, _next_look, _has_told
    now = time.monotonic()
    if now < _next_look:
        return
    _next_look = now + WINDOW
    import torch

    reading = read()
    if reading is None or _first is None:
        return
    before = torch.get_num_threads()
    begins = _cores is None
    if _cores is None:
        _cores = FreeCores(max(1, min(before, int(quota()))), _first)
    _cores.look(reading, at_once=begins)
    if _cores.threads == before:
        return
    torch.set_num_threads(_cores.threads)
    if _cores.threads < _cores.limit and not _has_told and os.environ.get("RANK", "0") == "0":
        _has_told = True
        logger.warning(
            "other processes take this machine's cores: computing with %d of %d threads until they are free. Results "
            "are equal within rounding; OMP_NUM_THREADS=%d fixes the number.",
            *(_cores.threads, _cores.limit, _cores.limit),
        )


def hold() -> None:
    """Keep the number of threads from now on: torch.compile compiles everything again when it changes."""
    global _next_look
    adjust()
    _next_look = float("inf")


def read() -> Reading | None:
    """The clocks now; None where the system does not say how long its cores were idle."""
    idle = idle_seconds(allowed_cores())
    return None if idle is None else Reading(time.monotonic(), time.process_time(), idle)


def allowed_cores() -> frozenset[int]:
    """The numbers of the cores that this process may run on."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def idle_seconds(cores: frozenset[int], stat: Path = Path("/proc/stat")) -> float | None:
    """For how long these cores have been idle in total; None where nothing says so."""
    try:
        rows = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")]
        ticks = {int(row[0][3:]): [int(ticks) for ticks in row[1:]] for row in rows if row[0] != "cpu"}
        idle = sum(ticks[core][3] + ticks[core][4] for core in cores)
        counts = all(sum(ticks[core]) for core in cores)
    except (OSError, ValueError, LookupError):
        return None
    return idle / os.sysconf("SC_CLK_TCK") if counts else None  # sandboxes show zeros


def quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """How many cores' time the control groups of this process allow it (containers, Slurm, systemd); else infinity."""
    groups = control_groups("cpu", root, membership)
    return min((share for folder in groups for share in _quotas(folder)), default=sys.maxsize)


def control_groups(
    controller: str, root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[Path]:
    """The folders of this process's control groups and of those around them; a container may see the root alone."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    folders = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":  # version 2
            top = root
        elif controller in controllers.split(","):
            top = root / controllers if (root / controllers).is_dir() else root / controller
        else:
            continue
        group = top / path.lstrip("/")
        folders += [group, *(parent for parent in group.parents if parent == top or top in parent.parents)]
    return folders


def _quotas(folder: Path) -> list[float]:
    """What a control group's files say, as far as they are there."""
    readers: dict[str, Callable[[], list[str]]] = {
        "cpu.max": lambda: (folder / "cpu.max").read_text().split(),
        "cpu.cfs_quota_us": lambda: [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")],
    }
    shares = []
    for read_file in readers.values():
        try:
            allowed, period = map(float, read_file())
        except (OSError, ValueError):  # no such file, or `max`
            continue
        if allowed > 0 and period > 0:  # version 1 says −1 for no limit
            shares.append(allowed / period)
    return shares
