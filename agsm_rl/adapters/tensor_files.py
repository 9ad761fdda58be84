"""Read a .safetensors file from anywhere: finite floating-point tensors and text metadata, or a UserError.

Every adapter, ours or not, is read through here, so that no reader forgets a check.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agsm_rl.errors import UserError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_JSON = 1_000_000
"""Longest JSON that is parsed, in characters; a LoRA's metadata has a few thousand."""


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file; UserError if it cannot be read or a tensor cannot be used."""
    try:
        if not file.is_file():  # opening a named pipe would block forever
            raise FileNotFoundError("it is not a regular file" if file.exists() else "there is no such file")
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            tensors, metadata = {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{file}: cannot be read, it is truncated or not safetensors ({error}). Export it again."
        ) from error
    for name, tensor in tensors.items():
        check_tensor(tensor, f"{file}: '{name}'")
    return tensors, metadata


def check_tensor(tensor: Tensor, what: str) -> None:
    """UserError unless the tensor is an ordinary floating-point one whose numbers are finite as float32."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise UserError(f"{what} is a sparse, quantized or empty (meta) tensor; only ordinary ones can be used.")
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UserError(f"{what} is {str(tensor.dtype).removeprefix('torch.')}; allowed: {allowed}.")
    if not torch.isfinite(tensor.float()).all():
        raise UserError(
            f"{what} holds numbers that are not finite, or too large for float32; images would be noise. "
            "Export another checkpoint."
        )


def parse_json(text: str, what: str) -> dict[str, Any]:
    """The JSON object of a text; UserError for anything else, or if it is too long or too deep."""
    try:
        if len(text) > MAX_JSON:
            raise ValueError(f"it has {len(text)} characters, more than {MAX_JSON}")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is broken: {error}.") from error
    return content
