"""The texts that a backbone encodes for training: its `encode_text` answers from the text cache, prompt by prompt."""

from typing import Any

import torch
from torch import Tensor

from agsm_rl.backbones.text_cache import TextCache, at_least
from agsm_rl.backbones.text_store import LENGTHS, Entry
from agsm_rl.interfaces import Cond

FLOAT32 = "float32"
"""The form of a part that is kept in half precision, because that holds its float32 numbers exactly."""


class CondTexts:
    """Replaces `encode_text` of a backbone, on this instance only."""

    def __init__(self, cache: TextCache, backbone: Any) -> None:
        self._cache, self._backbone = cache, backbone
        self._plain = backbone.encode_text
        self._is_padded: bool | None = None
        backbone.encode_text = self

    def __call__(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """What the backbone's own `encode_text` returns; no gradients flow into encoders that do not stay loaded."""
        unique = list(dict.fromkeys(prompts))
        rows = [{"text": text} for text in unique]
        entries = self._cache.entries(
            rows, {"count": len(unique)}, lambda numbers: self._encode([unique[n] for n in numbers], len(unique))
        )
        conds = {text: self._cond(text, entry) for text, entry in zip(unique, entries, strict=True)}
        return Cond.cat([conds[prompt] for prompt in prompts])

    def _encode(self, texts: list[str], count: int) -> list[Entry]:
        least, most = self._cache.company(count)
        if len(texts) <= 2 or not self._pads_alike():
            most = 1  # each by itself, with short ones: padded as it would be alone
        entries: list[Entry] = []
        for begin in range(0, len(texts), most):
            part = texts[begin : begin + most]
            entries += self._run(at_least(least, part))[: len(part)]
        return entries

    def _pads_alike(self) -> bool:
        """Whether short and long texts have as many rows, so that encoding them together is the same."""
        if self._is_padded is None:
            short, long = (self._plain([text, "a"]).embeds.shape for text in LENGTHS)
            self._is_padded = short == long
        return self._is_padded

    def _run(self, texts: list[str]) -> list[Entry]:
        cond = self._plain(texts)
        return [(_part(cond.embeds, n), _part(cond.pooled, n), _part(cond.mask, n)) for n in range(len(texts))]

    def _cond(self, text: str, entry: Entry) -> Cond:
        embeds, pooled, mask = (_whole(part, self._backbone.device) for part in entry)
        assert embeds is not None
        return Cond(embeds, pooled, (text,), mask=mask, combine=getattr(self._backbone, "combine", None))


def _part(values: Tensor | None, row: int) -> tuple[str, Tensor | None]:
    if values is None:
        return "none", None
    kept = values[row : row + 1].detach().cpu().clone()
    if kept.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal((half := kept.to(dtype)).float(), kept):
                return FLOAT32, half
    return "rows", kept


def _whole(part: tuple[str, Tensor | None], device: torch.device) -> Tensor | None:
    form, kept = part
    if kept is None:
        return None
    moved = kept.to(device)
    return moved.float() if form == FLOAT32 else moved
