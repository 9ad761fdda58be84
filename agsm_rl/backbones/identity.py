"""What an encoding depends on, as a digest: weights, configuration, tokenizers. Not where they were loaded from.

Encodings that are kept on disk are filed under it, so that another checkpoint under the same name is not mistaken for
the first, and the same weights in another folder are recognised.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from agsm_rl.backbones.quantized_layers import stored_tensors

PRIVATE = ("_", "transformers_version", "torch_dtype", "dtype", "quantization_config")
"""Beginnings of configuration keys that say nothing about what is computed; the weights' dtype and
quantisation are digested themselves."""


def digest_parts(parts: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A digest (32 hexadecimal digits) of modules and tokenizers by name, and of plain options."""
    found = hashlib.sha256(json.dumps(dict(options), sort_keys=True).encode())
    for name in sorted(parts):
        part = parts[name]
        found.update(f"{name}: {type(part).__name__}".encode())
        if isinstance(part, nn.Module):
            _digest_module(found, part)
        else:
            found.update(_tokenizer(part).encode())
    return found.hexdigest()[:32]


def _digest_module(found: Any, module: Any) -> None:
    config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
    plain = {key: value for key, value in config.items() if not key.startswith(PRIVATE)}
    found.update(json.dumps(plain, sort_keys=True, default=str).encode())
    for key, value in module.state_dict().items():
        for name, tensor in stored_tensors(key, value):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _tokenizer(tokenizer: Any) -> str:
    """Its rules and vocabulary; padding and truncation are left out, because each call sets them anew."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"padding": None, "truncation": None, "longest": tokenizer.model_max_length}
    if tokenizer.chat_template:  # a language model's, which says what goes around a prompt
        rules["chat"] = tokenizer.chat_template
    return json.dumps(rules | {"padded_with": tokenizer.pad_token}, sort_keys=True)
