"""The models to measure: the embedded base, or a model of Stable Diffusion 1.5's size with random weights."""

from typing import Any, Literal

import torch
from full_size_models import make_on

from agsm_rl.backbones.loading import load_pipeline

Size = Literal["embedded", "sd15"]
EMBEDDED = "builtin:shapes-sd15"


def make_pipeline(size: Size, device: str) -> Any:
    """A StableDiffusionPipeline in float32, with the same weights each time."""
    if size == "embedded":
        return load_pipeline(EMBEDDED, dtype=torch.float32).to(device)
    torch.manual_seed(0)
    return make_on("sd15", device, torch.float32)


def resolution_of(size: Size, device: str) -> int | None:
    """Pixels per side: None is the model's own; smaller for the large model on a CPU."""
    return 64 if size == "sd15" and device == "cpu" else None


def options_of(given: list[str]) -> dict[str, Any]:
    """Parse `key=value` arguments as a constructor's options; values are YAML."""
    import yaml

    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in given)}
