"""Tiny pipelines of the newer kinds of backbone, one module each; tests/backbones/test_every_kind.py covers them all.

A module is named as the backbone (`use:`) and has

- `make()`: a pipeline with random weights, a few layers and a tokenizer of its own, whose scheduler is a
  FlowMatchEulerDiscreteScheduler, so that its parts together draw the pipeline's picture;
- `make_full_size()`: the published configuration, called on torch's meta device;
- `SIZE`: the denoiser's parameters there, in billions;
- `OPTIONS`, if the kind has options that make it faster: those that tests load it with.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

KINDS = sorted(module.name for module in iter_modules(__path__))


def tiny(kind: str) -> Any:
    """The module of a kind."""
    return import_module(f"tiny.{kind}")


def options_of(kind: str) -> dict[str, Any]:
    """The options that tests load it with, besides its folder."""
    return {"device": "cpu", **getattr(tiny(kind), "OPTIONS", {})}


def save_kind(kind: str, folder: Path) -> Path:
    """The tiny pipeline's folder, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny(kind).make().save_pretrained(folder)
    return folder
