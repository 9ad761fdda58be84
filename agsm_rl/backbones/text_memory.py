"""The newest prompts that a backbone encoded, held in memory: epochs, draws and losses meet the same ones again.

A call of which a prompt is new is carried out as a whole, as it would be without the memory, so that no batch is
another than before. On a CPU, what is held counts for calls in which a text is rounded alike (text_cache.py); a GPU may
round it differently in batches of another size, also after a resume, which begins with nothing held.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agsm_rl.backbones.text_cache import COMPANIES, text_cache_of
from agsm_rl.backbones.text_store import LENGTHS
from agsm_rl.interfaces import Cond

IN_MEMORY = 256 * 2**20
"""Bytes of encoded prompts that are held at most, on the CPU."""


class TextMemory:
    """Takes the place of a backbone's `encode_text` while it is in use, which is in a trainer's steps. Between them
    `encode_text` is the backbone's own, because anybody may change the text encoders.

    Nothing is held while an adapter changes the text encoders, for gradients, or where the rows of a text depend on
    how long the others are.
    """

    def __init__(self, backbone: Any) -> None:
        self.plain: Callable[..., Cond] = backbone.encode_text
        """What encodes them: as the backbone does when the memory comes into use."""
        self._backbone = backbone
        self._held: OrderedDict[tuple[Any, ...], Cond] = OrderedDict()
        self._bytes = 0
        self._is_padded: bool | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, the backbone encodes texts from memory, unless it has a store of them (text_cache.py)."""
        if text_cache_of(self._backbone) is not None:
            yield
            return
        before, self.plain = vars(self._backbone).get("encode_text"), self._backbone.encode_text  # None: its class's
        self._backbone.encode_text = self
        try:
            yield
        finally:
            del self._backbone.encode_text
            if before is not None:
                self._backbone.encode_text = before

    def __call__(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """What the backbone's own `encode_text` returns."""
        if not prompts or not self._may_hold(gradients=gradients):
            return self.plain(prompts, gradients=gradients)
        settings = self._settings(len(set(prompts)))
        held = [self._held.get((prompt, *settings)) for prompt in prompts]
        if any(cond is None for cond in held):
            cond = self.plain(prompts, gradients=gradients)
            for row, prompt in enumerate(prompts if _size(cond) <= IN_MEMORY else ()):
                if (prompt, *settings) not in self._held:
                    self._hold((prompt, *settings), cond[[row]])
            return cond
        for prompt in prompts:
            self._held.move_to_end((prompt, *settings))
        cond = Cond.cat([one for one in held if one is not None])
        return _with(cond, lambda part: part.to(self._backbone.device))

    def _may_hold(self, *, gradients: bool) -> bool:
        if (gradients and torch.is_grad_enabled()) or self._backbone.device.type == "meta":
            return False
        if any(adapter.changes_text for adapter in self._backbone.adapters):
            return False
        if self._is_padded is None:
            short, long = (self.plain([text, "a"]).embeds.shape for text in LENGTHS)
            self._is_padded = short == long
        return self._is_padded

    def _settings(self, count: int) -> tuple[Any, ...]:
        """What the rows of a call depend on beside its texts."""
        kind = self._backbone.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        dtypes = tuple(next(encoder.parameters()).dtype for encoder in self._backbone.text_encoders.values())
        return autocast, dtypes, max(least for least, _ in COMPANIES if least <= count) if kind == "cpu" else 1

    def _hold(self, key: tuple[Any, ...], cond: Cond) -> None:
        kept = _with(cond, lambda part: part.detach().to("cpu", copy=True))
        self._held[key] = kept
        self._bytes += _size(kept)
        while self._bytes > IN_MEMORY and len(self._held) > 1:
            self._bytes -= _size(self._held.popitem(last=False)[1])


def _parts(cond: Cond) -> Mapping[str, Tensor]:
    parts = {"embeds": cond.embeds, "pooled": cond.pooled, "mask": cond.mask}
    return {name: part for name, part in parts.items() if part is not None}


def _with(cond: Cond, change: Callable[[Tensor], Tensor]) -> Cond:
    changed: dict[str, Any] = {name: change(part) for name, part in _parts(cond).items()}
    return replace(cond, **changed)


def _size(cond: Cond) -> int:
    return sum(part.numel() * part.element_size() for part in _parts(cond).values())
