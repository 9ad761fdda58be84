"""What tests of rewards in other processes share: the scripts' folder, short waits, and images to score."""

from pathlib import Path

import torch

WORKERS = Path(__file__).parent / "workers"
QUICK = {"timeout": 5.0, "start_timeout": 20.0, "retries": 2, "backoff": 0.001}


def images(count=2, start=0.0):
    """Images whose first pixels are start, start + 1, ..."""
    found = torch.zeros(count, 3, 2, 2)
    found[:, 0, 0, 0] = torch.arange(count) + start
    return found
