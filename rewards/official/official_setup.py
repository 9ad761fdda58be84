"""What the official workers share, in their own environments: torchvision's missing operators, and files by path or id.

It lies beside the worker scripts, whose folder comes first on their path.
"""

import importlib.util
import os
from pathlib import Path

import torch
from agsm_rl_worker import Refused

_operators = torch.library.Library("torchvision", "FRAGMENT")
"""Kept for the life of the process: what it defines disappears with it."""


def define_torchvision_operators() -> None:
    """Declare the two operators that `import torchvision` needs, if its own cannot be loaded.

    That is so where torchvision is a CUDA build and torch a CPU build. Where its own can be loaded, a second definition
    would end the process.
    """
    try:
        torch.ops.load_library(next(Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*")))
    except OSError:
        _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def found_or_fetched(place: str, file: str) -> str:
    """The path of `file`: `place` itself, a file in the folder `place`, or one fetched from that hub repository."""
    if os.path.isfile(place):
        return place
    if os.path.isdir(place):
        if os.path.isfile(os.path.join(place, file)):
            return os.path.join(place, file)
        raise Refused(f"there is no {file} in the folder {place}")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(place, file)
    except Exception as error:
        raise Refused(
            f"{file} of {place} is not on this machine and could not be downloaded ({type(error).__name__}); "
            f"download it with `hf download {place} {file}`, or give its path"
        ) from error


def wrong_weights(file: str, package: str, reason: object) -> Refused:
    """The refusal of a weight file that does not belong to the package."""
    return Refused(f"{file}: not {package}'s weights: {' '.join(str(reason).split())[:300]}")
