"""How much memory a device has free now: to keep what would otherwise be computed again, or draw more at once."""

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take; 0 where that is not known."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of a run on several, each asks
    return min(_available(), _left_in_container()) // processes


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def _left_in_container() -> int:
    try:
        limit, current = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(current))
    except (OSError, ValueError):  # no limit
        return 2**62
