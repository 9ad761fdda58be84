"""Losses and scores in at least single precision, whatever a run predicts in; what a CPU can predict in."""

import logging
import platform
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


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


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products of that dtype are made in software there, as in half precision on many x86 CPUs.

    On an AMD EPYC of the third generation, 6144 x 128 times 128 x 512 took 58 times as long in bfloat16 as in float32.
    """
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and not supported[dtype]()


def warn_if_slow(where: str, dtype: torch.dtype, device: torch.device) -> None:
    """Say so where a run is about to compute in software what another dtype would do in hardware."""
    if is_slow(dtype, device):
        name = str(dtype).removeprefix("torch.")
        logger.warning(
            "%s: this CPU has no instructions for %s, so that a step can take dozens of times as long as in float32; "
            "use float32 here",
            where,
            name,
        )
