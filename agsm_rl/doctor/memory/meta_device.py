"""Run a step without data: tensors on torch's meta device have shapes but no memory, and are counted as if they had.

The real trainer, objectives and backbone run, so nothing is modelled twice. torch's FakeTensorMode and MemTracker do
the same but do not work here: a fake integer has no value, while integers select rows, and MemTracker rejects a model
that is called twice in a step. Here integers and booleans computed from known values stay real, on the CPU, and so does
what is computed from them alone, such as a mask. They are counted like the tensors on the meta device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Rehearsal(TorchDispatchMode):
    """While entered, counts the bytes of live tensors on the meta device: `now`, and `peaks` by the current `phase`.

    Unknown values are replaced so that the run continues: booleans are true, an equality is false, other numbers are 1,
    and a copy to the CPU is zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.phase = ""
        self.peaks: dict[str, int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def touch(self, extra: int = 0) -> None:
        """Record that `extra` bytes on top of `now` were briefly in use."""
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now + extra)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options: dict[str, Any] = dict(kwargs or {})
        exact = False
        on_meta = [tensor.is_meta for tensor in _tensors((*args, *options.values()))]
        result = None
        if any(on_meta):
            if not all(on_meta):
                args, options = _together(func, args, options)
            result = _answer(func, args, options)
            if result is None and func in QUICK and not options:
                result = QUICK[func](*args)
        else:
            exact = _keep_exact(func, args, options)
        if result is None:
            result = func(*args, **options)
        for tensor in _tensors(result if isinstance(result, tuple | list) else (result,)):
            if tensor.is_meta or exact or (not any(on_meta) and self._are_counted((*args, *options.values()))):
                self._count(tensor)
        return result

    def _are_counted(self, values: Iterable[Any]) -> bool:
        """Whether a value is one of the tensors that would be on the run's device."""
        return any(tensor.untyped_storage()._cdata in self._known for tensor in _tensors(values))

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def on_delete(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, on_delete)
        self.now += size
        self.touch()

    def remember(self, call: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `call` so that it runs only once per key; later calls repeat the recorded memory and shapes.

        `key` maps the arguments to whatever the memory and shapes depend on; None means that the call must run.
        """
        past: dict[Any, tuple[int, Any]] = {}

        def again(*args: Any, **options: Any) -> Any:
            what = key(*args, **options)
            if what is None:
                return call(*args, **options)
            if what not in past:
                phase, before = self.phase, self.now
                self.phase = "remembered"
                self.touch()
                try:
                    result = call(*args, **options)
                finally:
                    self.phase, most = phase, self.peaks.pop("remembered")
                past[what] = most - before, tree_map_only(Tensor, _Shape.of, result)
                self.peaks[phase] = max(self.peaks.get(phase, 0), most)
                return result
            transient, shapes = past[what]
            self.touch(transient)
            return tree_map_only(_Shape, _Shape.empty, shapes)

        return again


@dataclass(frozen=True)
class _Shape:
    """Shape and dtype of a tensor on the meta device."""

    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> _Shape:
        return _Shape(tensor.shape, tensor.dtype)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=META)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=is_causal, scale=scale)[0]


# On CPUs and GPUs attention is a single kernel; the meta device would allocate all [tokens, tokens] scores.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("scaled_dot_product_attention", _fused, "AutogradMeta")


def _pointwise(*args: Any) -> Tensor | None:
    """The result of an elementwise function of tensors of one dtype, if it has the shape of the first."""
    first, *others = (tensor for tensor in args if isinstance(tensor, Tensor))
    if not first.dtype.is_floating_point or any(tensor.dtype != first.dtype for tensor in others):
        return None
    if others and torch.broadcast_shapes(first.shape, *(tensor.shape for tensor in others)) != first.shape:
        return None
    return torch.empty_like(first)


def _normalised(tensor: Tensor, statistics: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return tensor.new_empty(tensor.shape), tensor.new_empty(statistics), tensor.new_empty(statistics)


def _layer_norm(tensor: Tensor, shape: list[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _normalised(tensor, (*tensor.shape[: -len(shape)], *(1 for _ in shape)))


def _group_norm(tensor: Tensor, _weight: Any, _bias: Any, rows: int, _c: int, _hw: int, groups: int, *_: Any) -> Any:
    return _normalised(tensor, (rows, groups))


def _norm_backward(gradient: Tensor, tensor: Tensor, *rest: Any) -> Any:
    """The case of frozen weights, where only the input's gradient is needed."""
    return (tensor.new_empty(tensor.shape), None, None) if list(rest[-1]) == [True, False, False] else None


QUICK: dict[Any, Callable[..., Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.native_layer_norm_backward.default: _norm_backward,
    aten.native_group_norm_backward.default: _norm_backward,
    aten.addmm.default: lambda bias, first, second: first.new_empty(first.shape[0], second.shape[1]),
    aten.linalg_vector_norm.default: lambda tensor, *rest: tensor.new_empty(()) if len(rest) < 2 else None,
    **{
        overload: _pointwise
        for name in ("add", "sub", "mul", "div")
        for overload in (getattr(aten, name).Tensor, getattr(aten, name).Scalar)
    },
    **dict.fromkeys((aten.silu.default, aten.gelu.default, aten.gelu_backward.default, aten.sqrt.default), _pointwise),
    **dict.fromkeys(
        (aten.normal_.default, aten.uniform_.default, aten.lerp_.Scalar, aten.addcmul_.default, aten.addcdiv_.default),
        lambda first, *_: first,
    ),
}
"""Result shapes of the most frequent calls, faster than torch infers them; None for unusual arguments."""


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_exact(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _together(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The arguments with all tensors on the meta device; masks with known values become row indices."""
    if func in INDEXED:
        args = (args[0], _as_row_indices(args[1]), *args[2:])
    return tree_map_only(Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to(META), (args, options))


def _as_row_indices(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    rows: list[Tensor | None] = []
    for index in indices:
        if index is not None and not index.is_meta and index.dtype in (torch.bool, torch.uint8):
            rows.extend(index.nonzero(as_tuple=True))
        else:
            rows.append(index)
    return rows


def _keep_exact(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Keep tensors exact that would be created on, or moved to, the meta device from known values on the CPU."""
    if options.get("device") is None or torch.device(options["device"]) != META or func is aten.empty.memory_format:
        return False  # nothing is known of what was never filled: weights in few bits are so, and large
    dtype = options.get("dtype")
    source = next(_tensors(args), None)
    if dtype is None and source is not None:
        dtype = source.dtype
    if dtype is not None:
        exact = _is_exact(dtype)
    else:
        exact = func.name().startswith("aten::arange") and all(isinstance(value, int) for value in args)
    if exact:
        options["device"] = CPU
    return exact


def _answer(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """The stand-in for an unknown value that the call would read; None if it reads none."""
    tensor = args[0]
    if func is aten._local_scalar_dense.default:
        return True if tensor.dtype == torch.bool else 1 if _is_exact(tensor.dtype) else 1.0
    if func is aten.eq.Scalar and tensor.dim() == 0:
        return torch.tensor(False)
    if func is aten._to_copy.default and torch.device(options.get("device") or META).type == "cpu":
        return torch.zeros(tensor.shape, dtype=options.get("dtype") or tensor.dtype)
    return None
