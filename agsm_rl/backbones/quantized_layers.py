"""Linear layers whose frozen weight is kept in few bits: one to train through, and one to count memory with.

torchao's own linear function keeps the weight that it has converted to floating point until the backward pass, for
every layer of the model: in training, a quantised model would then need as much memory as the original. The layer here
computes the same output, bit for bit, but converts the weight again when the gradient asks for it, as bitsandbytes
does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK, NESTED_BLOCK = 64, 256
"""Weights for each scale of NF4, and scales for each scale of the scales (arXiv 2305.14314, section 3)."""


class QuantizedLinear(nn.Linear):
    """A linear layer with a frozen torchao weight; no converted weight is kept for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """The output of torchao's own linear function."""
        if torch.is_grad_enabled() and input.requires_grad:
            result: Tensor = _FrozenLinear.apply(input, self.weight, self.bias, _as_float)
            return result
        return functional.linear(input, self.weight, self.bias)


class _FrozenLinear(torch.autograd.Function):
    """A linear function of frozen weights, which remembers nothing but the layer's own tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, as_float: Callable[..., Tensor]) -> Tensor:
        ctx.weight, ctx.as_float = weight, as_float
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return gradient @ ctx.as_float(ctx.weight, gradient.dtype), None, None, None


def _as_float(weight: Any, dtype: torch.dtype) -> Tensor:
    """A torchao weight of one scale per row, in floating point."""
    converted: Tensor = weight.qdata.to(dtype)
    return converted.mul_(weight.scale.to(dtype))


def train_through(model: nn.Module) -> None:
    """Make each linear layer of `model` with a torchao weight a QuantizedLinear, in place."""
    for module in model.modules():
        if type(module) is nn.Linear and hasattr(module.weight, "qdata"):
            module.__class__ = QuantizedLinear


@dataclass(frozen=True)
class Layout:
    """How a kind of quantisation stores a weight."""

    dtype: torch.dtype
    per_byte: int = 1
    """Weights that share a byte."""
    scales: Callable[[int, int], dict[str, tuple[int, torch.dtype]]] = lambda rows, columns: {
        "scale": (rows, torch.float32)
    }
    """What is stored beside it, of how many elements and of which dtype, for a number of rows and columns."""
    converted_in: torch.dtype | None = None
    """The dtype in which a weight is scaled before it is converted to the input's; None is the input's."""
    products: int = 1
    """Outputs that are in memory at once: 2 where the product is scaled, or the bias added, into another tensor."""


def _nf4_scales(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
    blocks = -(-rows * columns // BLOCK)
    return {
        "absmax": (blocks, torch.uint8),
        "nested_absmax": (-(-blocks // NESTED_BLOCK), torch.float32),
        "code": (16, torch.float32),
        "nested_code": (256, torch.float32),
        "offset": (1, torch.float32),
    }


def _int8_scales(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
    return {"scale": (rows, torch.float32), "zero_point": (rows, torch.int8)}


LAYOUTS = {
    "int8": Layout(torch.int8, scales=_int8_scales, products=2),
    "fp8": Layout(
        torch.int8, converted_in=torch.float32, products=2
    ),  # int8, for nothing to be cast to a weight's dtype
    "nf4": Layout(torch.uint8, per_byte=2, scales=_nf4_scales),
}


class EmptyQuantizedLinear(nn.Linear):
    """A layer without data, on torch's meta device, that holds and takes as much memory as a quantised one."""

    def __init__(self, linear: nn.Linear, layout: Layout) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.layout = linear.in_features, linear.out_features, layout
        rows, columns = linear.out_features, linear.in_features
        size = (rows, columns) if layout.per_byte == 1 else (-(-rows * columns // layout.per_byte), 1)
        packed = torch.empty(size, dtype=layout.dtype, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        for name, (count, dtype) in layout.scales(rows, columns).items():
            self.register_buffer(name, torch.empty(count, dtype=dtype, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """An output without data."""
        if torch.is_grad_enabled() and input.requires_grad:
            result: Tensor = _EmptyFrozenLinear.apply(input, self)
            return result
        return self.output(input)

    def output(self, input: Tensor) -> Tensor:
        """`forward`'s, without a gradient."""
        result = functional.linear(input, self.dequantize(input.dtype), self.bias)
        return result if self.layout.products == 1 else result * 1.0

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A weight in floating point, made by way of as much memory as the library takes."""
        first = torch.empty(self.out_features, self.in_features, dtype=self.layout.converted_in or dtype, device="meta")
        return first if first.dtype == dtype else (first * 1.0).to(dtype)


class _EmptyFrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: EmptyQuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.output(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight = torch.empty(
            ctx.layer.out_features, ctx.layer.in_features, dtype=gradient.dtype, device=gradient.device
        )
        return gradient @ weight, None


def count_as_quantized(model: nn.Module, names: list[str], kind: str) -> None:
    """Replace the named linear layers of a model on the meta device, in place."""
    for name in names:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, child, EmptyQuantizedLinear(model.get_submodule(name), LAYOUTS[kind]))  # type: ignore[arg-type]


def stored_tensors(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The plain tensors that a parameter is stored in, with their names: itself, or the parts of a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor) is Tensor:
        return [(name, tensor)]
    inner, _ = tensor.__tensor_flatten__()
    return [stored for key in inner for stored in stored_tensors(f"{name}.{key}", getattr(tensor, key))]


def quantization_of(model: nn.Module) -> str | None:
    """How a loaded model is quantised: nf4, int8 or fp8, another method by its library's name, or None."""
    for module in model.modules():
        weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
        known = _kind_of(weight)
        if known is not None:
            return known
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _kind_of(weight: Any) -> str | None:
    name = type(weight).__name__
    if name == "Params4bit":
        return str(weight.quant_type)
    return {"Int8Tensor": "int8", "Float8Tensor": "fp8"}.get(name)
