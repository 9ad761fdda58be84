"""The inputs on which this package and the real TRL 0.11.4 are compared: numbers by formula, the same everywhere."""

import base64
import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROMPTS = ["a red star", "two blue circles"]
NUM_STEPS = 4
GUIDANCE = 5.0
CLIP_RANGE = 0.1
UPDATE = {"train_clip_range": CLIP_RANGE, "train_gradient_accumulation_steps": 2, "train_learning_rate": 1e-2}
# An epsilon that AdamW's first step is not the gradient's sign for, and no clipping: a wrong factor is seen.
UPDATE |= {"train_adam_epsilon": 1.0, "train_max_grad_norm": 1e6}
NEGATIVE = "a green square"

REWARDS = [
    [0.0, 1.0, 2.0, 5.0, 3.0, 3.5],
    [0.2, 1.5, 2.5, 4.0, 3.0, 30.0],
    [9.0, 9.0, 9.0, 9.5, 0.25, 1.0],
]
"""Three epochs of six images; with `TRACKED_PROMPTS`, "a" fills its buffer of 4 and "c" has too few for its own."""
TRACKED_PROMPTS = [["a", "a", "b", "b", "a", "c"], ["a", "a", "a", "b", "b", "b"], ["a", "b", "a", "b", "a", "c"]]


def normal(shape: tuple[int, ...], name: str) -> Tensor:
    """Values like N(0, 1) noise, fixed by the name: a low-discrepancy sequence through the normal quantile."""
    start = zlib.crc32(name.encode()) / 2**32
    uniform = (start + torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) * (math.sqrt(5) - 1) / 2) % 1
    return torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).reshape(shape).float()


def fill_lora(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Give each LoRA matrix values fixed by its layer's name; `parameters` by "<layer>.lora_A" and "<layer>.lora_B"."""
    for name, parameter in parameters.items():
        parameter.data.copy_(0.2 * normal(tuple(parameter.shape), name))


def pack(latents: Tensor) -> dict[str, Any]:
    """Latents as text, in half precision (both sides then learn from the same rounded ones)."""
    content = latents.half().numpy().astype("<f2").tobytes()
    return {"shape": list(latents.shape), "half": base64.b64encode(content).decode()}


def unpack(packed: dict[str, Any]) -> Tensor:
    """What `pack` wrote, in float32."""
    content = np.frombuffer(base64.b64decode(packed["half"]), dtype="<f2").astype(np.float32)
    return torch.from_numpy(content).reshape(packed["shape"])


def projections(values: dict[str, Tensor]) -> dict[str, float]:
    """Each of these along a direction fixed by its name: unlike a norm, it tells a sign or another order of rows."""
    return {name: float((value.detach() * normal(tuple(value.shape), name)).sum()) for name, value in values.items()}
