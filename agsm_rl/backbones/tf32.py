"""`backbone.allow_tf32`: float32 matrix products in TF32, for the whole process, on GPUs that have it."""

import logging

import torch

logger = logging.getLogger(__name__)
AMPERE = (8, 0)
"""The first GPUs with TF32, by compute capability."""


def allow_tf32(device: torch.device) -> None:
    """Switch TF32 on; a warning says so where this machine has none, and all stays as it is."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < AMPERE:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        logger.warning(
            "backbone.allow_tf32: without effect, because %s has no TF32; only NVIDIA GPUs since Ampere (A100, RTX 30) "
            "have it",
            name,
        )
        return
    torch.set_float32_matmul_precision("high")


def is_tf32_allowed(device: torch.device) -> bool:
    """Whether float32 products on that device are made in TF32, which changes what encoders give."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
