"""Losses and scores in at least single precision, whatever a run predicts in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest_float(device: torch.device) -> torch.dtype:
    """float64, in which noise levels are compared; float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def own_precision(device: torch.device) -> AbstractContextManager[object]:
    """Within the block, operations on the device keep their tensors' own precision, whatever the run's."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
