"""Run a step without its numbers: tensors on torch's meta device have shapes but no memory, and are counted as if.

The real trainer, objectives and backbone run, so that nothing is described a second time. torch has the same idea in
FakeTensorMode and MemTracker; they do not serve here: a fake integer has no value, but rows are chosen by integers, and
MemTracker refuses a network that is called twice in a step. Here integers and booleans that are made from known values
stay real, on the CPU; only floating-point tensors on the meta device are counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Rehearsal(TorchDispatchMode):
    """While entered, counts the bytes of living tensors on the meta device: `now`, and `peaks` by the current `phase`.

    Whatever is asked of a number that is not known is answered so that the run goes on: booleans are true, an equality
    is false, other numbers are 1, and a copy to the CPU is zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.phase = ""
        self.peaks: dict[str, int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def touch(self, extra: int = 0) -> None:
        """Note that `extra` bytes beyond those of now were in use for a moment."""
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now + extra)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, options = _placed(func, args, dict(kwargs or {}))
        known, answer = _answered(func, args, options)
        found = answer if known else func(*args, **options)
        for tensor in _tensors(found):
            if tensor.is_meta:
                self._count(tensor)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.touch()

    def remember(self, call: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which is run for the first of equal arguments only; then its memory and shapes are known.

        `key` gives of the arguments what these depend on; None where the call must be run.
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
                    found = call(*args, **options)
                finally:
                    self.phase, most = phase, self.peaks.pop("remembered")
                past[what] = most - before, tree_map_only(Tensor, _Shape.of, found)
                self.peaks[phase] = max(self.peaks.get(phase, 0), most)
                return found
            transient, shapes = past[what]
            self.touch(transient)
            return tree_map_only(_Shape, _Shape.empty, shapes)

        return again


@dataclass(frozen=True)
class _Shape:
    """What is kept of a tensor on the meta device."""

    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> _Shape:
        return _Shape(tensor.shape, tensor.dtype)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=META)


class FusedAttention(TorchFunctionMode):
    """While entered, attention on the meta device is one kernel, as on CPUs and GPUs, and holds no [tokens, tokens]."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | options
            if given["query"].is_meta:
                known = {name: given[name] for name in ("is_causal", "scale") if name in given}
                query, key, value = (given[name] for name in names[:3])
                return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, **known)[0]
        return func(*args, **options)


@contextmanager
def rehearsing() -> Iterator[Rehearsal]:
    """Within the block, tensors on the meta device are counted, and attention is the fused kernel."""
    with FusedAttention(), Rehearsal() as rehearsal:
        yield rehearsal


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


def _is_exact(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _placed(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with all tensors where they can meet: exact numbers of known values on the CPU, others on meta."""
    tensors = list(_tensors((args, options)))
    if any(tensor.is_meta for tensor in tensors):
        if func in INDEXED:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        if func is not aten._to_copy.default or len(tensors) > 1:
            args, options = tree_map_only(Tensor, lambda one: one.to(META) if not one.is_meta else one, (args, options))
    elif options.get("device") is not None and torch.device(options["device"]) == META:
        if tensors:
            exact = _is_exact(options.get("dtype") or tensors[0].dtype)
        elif options.get("dtype") is not None:
            exact = _is_exact(options["dtype"])
        else:
            exact = func.name().startswith("aten::arange") and all(isinstance(one, int) for one in args)
        if exact:
            options["device"] = CPU
    return args, options


def _as_numbers(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks of known values as the numbers of their rows."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and not index.is_meta and index.dtype in (torch.bool, torch.uint8):
            found.extend(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def _answered(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether this asks for a number that is not known, and what is said instead."""
    first = args[0] if args else None
    if not (isinstance(first, Tensor) and first.is_meta):
        return False, None
    if func is aten._local_scalar_dense.default:
        return True, {torch.bool: True}.get(first.dtype, 1 if _is_exact(first.dtype) else 1.0)
    if func is aten.eq.Scalar and first.dim() == 0:
        return True, torch.tensor(False)
    if func is aten._to_copy.default and options.get("device") is not None:
        if torch.device(options["device"]).type == "cpu":
            return True, torch.zeros(first.shape, dtype=options.get("dtype") or first.dtype)
    return False, None
