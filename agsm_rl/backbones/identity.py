"""What an encoding or a drawing depends on, as a digest: weights, configuration, tokenizers; not where they come from.

Encodings and figures that are kept on disk are filed under it, so that another checkpoint under the same name is not
mistaken for the first, and the same weights in another folder are recognised.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
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


def digest_base(parts: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A digest of a whole pipeline's parts, schedulers among them, as they are with all of PEFT's adapters off."""
    found = hashlib.sha256(json.dumps(dict(options), sort_keys=True, default=str).encode())
    for name in sorted(parts):
        part = parts[name]
        found.update(f"{name}: {type(part).__name__}".encode())
        if isinstance(part, nn.Module):
            found.update(_plain_config(part).encode())
            for key, value in sorted(_without_adapters(part)):
                _digest_tensor(found, key, value)
        elif hasattr(part, "backend_tokenizer"):
            found.update(_tokenizer(part).encode())
        elif hasattr(part, "config"):
            found.update(_plain_config(part).encode())
    return found.hexdigest()[:32]


def _without_adapters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The module's tensors under the names that they have without PEFT's layers around them."""
    held: tuple[str, ...] = ()
    wrapped: list[str] = []
    if "peft" in sys.modules:  # otherwise nothing can have been added, and importing it takes seconds
        from agsm_rl.adapters.peft_layers import tuner_layers

        layers = tuner_layers(module)
        held = tuple(f"{name}.{attribute}." for name, layer in layers for attribute in layer.adapter_layer_names)
        wrapped = [f"{name}.base_layer." for name, _ in reversed(layers)]  # the innermost of nested layers first
    for key, value in module.state_dict().items():
        if key.startswith(held):
            continue
        for prefix in wrapped:
            if key.startswith(prefix):
                key = prefix.removesuffix("base_layer.") + key.removeprefix(prefix)
        yield key, value


def _digest_module(found: Any, module: Any) -> None:
    found.update(_plain_config(module).encode())
    for key, value in module.state_dict().items():
        _digest_tensor(found, key, value)


def _digest_tensor(found: Any, key: str, value: Any) -> None:
    for name, tensor in stored_tensors(key, value):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _plain_config(part: Any) -> str:
    config = part.config if isinstance(part.config, Mapping) else part.config.to_dict()
    return json.dumps({k: v for k, v in config.items() if not k.startswith(PRIVATE)}, sort_keys=True, default=str)


def _tokenizer(tokenizer: Any) -> str:
    """Its rules and vocabulary; padding and truncation are left out, because each call sets them anew."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"padding": None, "truncation": None, "longest": tokenizer.model_max_length}
    if tokenizer.chat_template:  # a language model's, which says what goes around a prompt
        rules["chat"] = tokenizer.chat_template
    return json.dumps(rules | {"padded_with": tokenizer.pad_token}, sort_keys=True)
