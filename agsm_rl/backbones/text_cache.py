"""Each prompt is encoded once: what encodes texts answers from a store, and uses the text encoders for what is new.

Texts are encoded in two places, which are both replaced on one backbone and its pipeline: `encode_text`, for training
(cond_texts.py), and the pipeline's `encode_prompt`, for drawing (pipeline_texts.py). A text gets the numbers of an
ordinary call wherever the encoders give it the same numbers in every batch. A GPU may round differently for every batch
size. On a CPU, a product with one row, two or three rows, or more rows rounds differently (the projection of a CLIP),
so there a text is kept for each of the three.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from agsm_rl.backbones.residency import TextEncoders
from agsm_rl.backbones.text_store import AT_ONCE, Entry, TextStore
from agsm_rl.interfaces import Backbone, Shard

COMPANIES = ((1, 1), (2, 2), (4, AT_ONCE))
"""Numbers of texts, at least and at most, among which a text is encoded on a CPU with the same rounding."""


class _Known(Exception):
    """Raised in place of an answer, when all of a call's texts are in the store, which is all that was asked for."""


class _Encoded(Exception):
    """Raised in place of drawing, when all texts are encoded."""


class TextCache:
    """Encodes the texts that CondTexts and PipelineTexts ask for, each once.

    encoders: what encodes them. identity: of the encoders (`Backbone.identity("text")`). frees: whether their weights
    are dropped while no new texts come.
    """

    def __init__(self, encoders: TextEncoders, store: TextStore, *, identity: str, frees: bool) -> None:
        self.encoders, self.identity, self._store, self._frees = encoders, identity, store, frees
        self.is_encoding = False
        self.encoded = 0
        """Texts that were encoded so far, because they were not in the store."""
        self._encoded_before = -1
        self._only_new = False

    def entries(
        self,
        rows: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        encode: Callable[[list[int]], list[Entry]],
    ) -> list[Entry]:
        """Each row's entry. `encode` makes those of some rows, by their numbers, for what is not in the store.

        A row's entry depends on the row, on what all rows share (`settings`), and on whether it is the only row.
        """
        keys = [self._key(row, settings) for row in rows]
        found: dict[str, Entry] = {}
        missing: dict[str, int] = {}
        for number, key in enumerate(keys):
            if key in found or key in missing or (self._only_new and key in self._store):
                continue
            entry = None if self._only_new else self._store.get(key)
            if entry is None:
                missing[key] = number
            else:
                found[key] = entry
        if missing:
            made = self._encoded_by(encode, list(missing.values()))
            for key, entry in zip(missing, made, strict=True):
                self._store.put(key, entry)
                found[key] = entry
            self.encoded += len(missing)
        if self._only_new:
            raise _Known
        return [found[key] for key in keys]

    def _encoded_by(self, encode: Callable[[list[int]], list[Entry]], numbers: list[int]) -> list[Entry]:
        self.is_encoding = True
        try:
            with self.encoders.in_use(), torch.no_grad():
                return encode(numbers)
        finally:
            self.is_encoding = False

    def _key(self, row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
        device = self.encoders.device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        company = self.company(settings["count"])
        of = {"encoders": self.identity, "autocast": autocast, "company": company}
        return self._store.key({**row, **settings, "count": None, **of})

    def company(self, count: int) -> tuple[int, int]:
        """With how many texts those of a call with `count` are encoded: at least, and at most."""
        if self.encoders.device.type != "cpu":
            return 1, AT_ONCE
        return max(one for one in COMPANIES if one[0] <= count)

    def end_step(self) -> None:
        """After a step without new texts, drop the encoders' weights, where the cache frees them."""
        if self._frees and self.encoded == self._encoded_before:
            self.encoders.free()
        self._encoded_before = self.encoded

    def fill(self, backbone: Backbone, texts: Sequence[str], shard: Shard) -> None:
        """Encode this process's share of the texts, as far as they are not in the store yet."""
        unique = list(dict.fromkeys(texts))[shard.index :: shard.count]
        batches = [
            at_least(least, unique[begin : begin + most])
            for least, most in {self.company(count) for count in (1, 2, AT_ONCE)}
            for begin in range(0, len(unique), most)
        ]
        is_reported = False
        self._only_new = True
        try:
            with self.encoders.staying():
                for number, batch in enumerate(batches):
                    encoded, written = self.encoded, self._store.written
                    with suppress(_Known):
                        backbone.encode_text(batch)
                    if self.encoded > encoded and not is_reported:
                        each = (self._store.written - written) / (self.encoded - encoded)
                        self._store.look_for_room(sum(map(len, batches[number + 1 :])), each)
                        is_reported = True
        finally:
            self._only_new = False


def at_least(count: int, texts: list[str]) -> list[str]:
    """The texts, followed by short ones if they are fewer than `count` (4 at most)."""
    others = [text for text in ("", "a", "b", "c", "d") if text not in texts]
    return [*texts, *others[: max(0, count - len(texts))]]


def text_cache_of(backbone: Backbone) -> TextCache | None:
    """The backbone's text cache; None if its encoders stay loaded."""
    found: TextCache | None = getattr(backbone, "text_cache", None)
    return found


@contextmanager
def up_to_drawing(backbone: Backbone) -> Iterator[None]:
    """Within the block, drawing and editing end as soon as all texts are encoded."""

    def encoded(*args: Any, **options: Any) -> Any:
        raise _Encoded

    cache = text_cache_of(backbone)
    with (
        nullcontext() if cache is None else cache.encoders.staying(),
        suppress(_Encoded),
        _replaced(backbone.pipeline, "prepare_latents", encoded),
        _replaced(backbone, "predict", encoded),
    ):
        yield


@contextmanager
def _replaced(holder: Any, name: str, by: Any) -> Iterator[None]:
    """Within the block, a method of this instance alone is another."""
    own = vars(holder).get(name)
    setattr(holder, name, by)
    try:
        yield
    finally:
        delattr(holder, name) if own is None else setattr(holder, name, own)
