"""How much memory a device has free now: to keep what would otherwise be computed again, or draw more at once."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from agsm_rl.threads import control_groups

NO_LIMIT = 2**62


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take; 0 where that is not known."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of a run on several, each asks
    return min(_available(), _left_in_control_groups()) // processes


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def _left_in_control_groups() -> int:
    """What the limits of this process's control groups leave (containers, Slurm, systemd)."""
    return min((left for folder in control_groups("memory") for left in _left(folder)), default=NO_LIMIT)


def _left(folder: Path) -> list[int]:
    found = []
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with suppress(OSError, ValueError):  # no such file, or `max`
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            found.append(max(0, left + _reclaimable(folder)))
    return found


def _reclaimable(folder: Path) -> int:
    """Bytes of files that were read and can be dropped, which count as used."""
    with suppress(OSError, ValueError):
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        return max(int(value) for name, value in lines if name in ("inactive_file", "total_inactive_file"))
    return 0
