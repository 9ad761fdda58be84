"""The texts that a pipeline encodes to draw: its `encode_prompt` answers from the text cache.

A call is taken apart into its prompts and its negative prompts, which are encoded and kept one by one, and its answer
is put together from them.
"""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from agsm_rl.backbones.text_cache import TextCache
from agsm_rl.backbones.text_store import LENGTHS, Entry

PROMPTS = ("prompt", "prompt_2", "prompt_3")
NEGATIVES = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")
GUIDED = "do_classifier_free_guidance"


@dataclass(frozen=True)
class _Half:
    """The prompts of a call, or its negative prompts: by argument one text per row, and what else they depend on."""

    texts: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any]
    count: int
    negative: bool = False

    def row(self, number: int) -> dict[str, str]:
        return {name: rows[number] for name, rows in self.texts.items()}

    def arguments(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The arguments of `encode_prompt` for some of the rows."""
        chosen = {name: [rows[number] for number in numbers] for name, rows in self.texts.items()}
        # The prompts beside negative prompts are encoded too, for nothing.
        return {**self.settings, **({"prompt": [""] * len(numbers)} if self.negative else {}), **chosen}


class PipelineTexts:
    """Replaces `encode_prompt` of a pipeline, on this instance only."""

    def __init__(self, cache: TextCache, pipeline: Any) -> None:
        self._cache, self._pipeline, self._plain = cache, pipeline, pipeline.encode_prompt
        self._signature = inspect.signature(pipeline.encode_prompt)
        self._is_padded: dict[str, bool] = {}
        pipeline.encode_prompt = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the pipeline's own `encode_prompt` returns for these arguments."""
        prompts, negatives, device = self._halves(args, options)
        if prompts is None or self._cache.is_encoding:
            with self._cache.encoders.in_use():
                return self._plain(*args, **options)
        results = [_joined(parts, device) for parts in zip(*self._entries(prompts), strict=True)]
        if negatives is not None:
            others = [_joined(parts, device) for parts in zip(*self._entries(negatives), strict=True)]
            # Without guidance, a pipeline leaves the places of the negative prompts empty.
            results = [other if _is_empty(one) else one for one, other in zip(results, others, strict=True)]
        return tuple(_with_mask(results))

    def _halves(self, args: Any, options: Any) -> tuple[_Half | None, _Half | None, Any]:
        """A call's prompts, its negative prompts where they are used, and its device; no prompts: it is not cached."""
        bound = self._signature.bind(*args, **options)
        bound.apply_defaults()
        given = dict(bound.arguments)
        device = given.pop("device", None) or self._pipeline._execution_device
        prompt = given.get("prompt")
        ready = any(value is not None for name, value in given.items() if name.endswith(("embeds", "mask")))
        several = given.get("num_images_per_prompt", 1) != 1
        if prompt is None or ready or several or torch.device(device).type == "meta":
            return None, None, device
        given["prompt"] = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(given["prompt"])
        texts = {name: tuple(given.pop(name)) for name in (*PROMPTS, *NEGATIVES) if isinstance(given.get(name), list)}
        try:
            json.dumps(given)
        except TypeError:
            return None, None, device
        if any(len(rows) != count for rows in texts.values()) or any(isinstance(given.get(n), str) for n in PROMPTS):
            return None, None, device
        guided = given.pop(GUIDED, False)
        has_both = GUIDED in self._signature.parameters
        negative = {name: given.pop(name) for name in NEGATIVES if name in given}
        prompts = _Half(
            {name: rows for name, rows in texts.items() if name in PROMPTS},
            given | ({GUIDED: False} if has_both else {}),
            count,
        )
        rows = {name: rows for name, rows in texts.items() if name in NEGATIVES}
        others = {name: None for name in PROMPTS[1:] if name in self._signature.parameters}
        return prompts, _Half(rows, given | others | negative | {GUIDED: True}, count, True) if guided else None, device

    def _entries(self, half: _Half) -> list[Entry]:
        """Each row's entry."""
        settings = {"negative": half.negative, "settings": half.settings, "count": half.count}
        rows = [{"texts": half.row(number)} for number in range(half.count)]
        return self._cache.entries(rows, settings, lambda numbers: self._encode(half, numbers))

    def _encode(self, half: _Half, numbers: list[int]) -> list[Entry]:
        least, most = self._cache.company(half.count)
        if len(numbers) <= 2 or not self._pads_alike(half):
            most = 1  # each by itself, repeated: padded as it would be alone
        entries: list[Entry] = []
        for begin in range(0, len(numbers), most):
            part = numbers[begin : begin + most]
            entries += self._run(half, [*part, *[part[0]] * (least - len(part))])[: len(part)]
        return entries

    def _pads_alike(self, half: _Half) -> bool:
        """Whether short and long texts give results of the same shapes, so that encoding them together is the same."""
        place = json.dumps([dict(half.settings), half.negative, [*half.texts]], sort_keys=True)
        if place not in self._is_padded:
            short, long = (
                self._run(_Half(dict.fromkeys(half.texts, (text, text)), half.settings, 2, half.negative), [0, 1])
                for text in LENGTHS
            )
            shapes = [[part.shape for _, part in entry if part is not None] for entry in (short[0], long[0])]
            self._is_padded[place] = shapes[0] == shapes[1]
        return self._is_padded[place]

    def _run(self, half: _Half, numbers: list[int]) -> list[Entry]:
        """The rows' entries, encoded together."""
        options = half.arguments(numbers)
        if "device" in self._signature.parameters:
            options["device"] = self._cache.encoders.device
        results = self._plain(**options)
        columns = [_split(result, len(numbers)) for result in results]
        return [tuple(column[number] for column in columns) for number in range(len(numbers))]


def _split(result: Any, count: int) -> list[tuple[str, Tensor | None]]:
    """A result of `encode_prompt` for `count` texts, text by text, with its form.

    Forms: `none`; `empty`, an empty list; `list`, a tensor per text; `rows`, a row per text; `shared`, one for all.
    """
    if result is None or isinstance(result, list) and not result:
        return [("none" if result is None else "empty", None)] * count
    if isinstance(result, list):
        return [("list", part.detach().cpu().clone()) for part in result]
    kept = result.detach().cpu()
    if len(kept) != count:
        return [("shared", kept.clone())] * count
    return [("rows", part.clone()) for part in kept.split(1)]


def _joined(parts: Sequence[tuple[str, Tensor | None]], device: Any) -> Any:
    """A result of `encode_prompt` for the texts that these parts belong to, shorter rows padded by zeros."""
    form, first = parts[0]
    if first is None:
        return None if form == "none" else []
    tensors = [part.to(device) for _, part in parts if part is not None]
    if form == "list":
        return [tensor.clone() for tensor in tensors]
    if form == "shared":
        return tensors[0].clone()
    if first.ndim < 2:
        return torch.cat(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    if all(tensor.shape[1] == longest for tensor in tensors):
        return torch.cat(tensors)
    ends = [(0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1]) for tensor in tensors]
    return _Padded(torch.cat([pad(*both) for both in zip(tensors, ends, strict=True)]), [t.shape[1] for t in tensors])


@dataclass(frozen=True)
class _Padded:
    """Rows of several lengths, padded to the longest."""

    rows: Tensor
    lengths: list[int]

    def mask(self) -> Tensor:
        """1 for what is no padding, [B, S]."""
        places = torch.arange(self.rows.shape[1], device=self.rows.device)
        return (places < torch.tensor(self.lengths, device=self.rows.device)[:, None]).long()


def _with_mask(results: list[Any]) -> Iterator[Any]:
    """The results as tensors. A pipeline that pads to the longest text gives no mask where there is nothing to mask."""
    before: Any = None
    for result in results:
        yield before.mask() if result is None and isinstance(before, _Padded) else _rows(result)
        before = result


def _rows(result: Any) -> Any:
    return result.rows if isinstance(result, _Padded) else result


def _is_empty(result: Any) -> bool:
    return result is None or isinstance(result, list) and not result
