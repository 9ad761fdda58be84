"""The encoding cache: latents once per image and text once per caption, in bfloat16, kept on disk between runs.

Latents are filed under the data set, the autoencoder and the sizes, text under the captions and the text encoders: a
change of any of them is another folder. Nothing of a text's padding is dropped but exact zeros, because every other
row of it differs from prompt to prompt, and the denoiser attends to all of them (docs/cache.md).
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.files import write_text
from agsm_rl.interfaces import Adapter, Backbone, Cond, Shard
from agsm_rl.sources.cache_folder import cache_folder
from agsm_rl.sources.frames import Frames
from agsm_rl.sources.kept_rows import Content, KeptRows
from agsm_rl.sources.latents import fit
from agsm_rl.sources.pictures import read_picture
from agsm_rl.training.precision import own_precision
from agsm_rl.training.sizes import Size, size_of

FORMAT = 1
"""Part of each key: raise it when the same inputs are encoded or kept otherwise."""
IMAGES_AT_ONCE = 4
"""Given to the autoencoder together."""

Kept = Literal["latents", "all"]


def check_cache(kept: Kept | None, *, streaming: bool) -> Kept | None:
    """What a source should keep; UserError for anything else, and for a stream."""
    if kept not in (None, *get_args(Kept)):
        raise unknown_name("cache", str(kept), "a thing to keep", get_args(Kept))
    if kept and streaming:
        raise UserError(
            "cache: the rows of a streamed data set have no numbers to be kept under; leave out `streaming`, or `cache`"
        )
    return kept


def check_text_stays(adapters: Collection[Adapter], *, where: str) -> None:
    """UserError when an adapter changes the text encoders: kept text would be that of the base."""
    if any(adapter.changes_text for adapter in adapters):
        raise UserError(
            f"{where}: an adapter changes the text encoders, so that prompts must be encoded anew at each step; write "
            "`cache: latents` to keep the latents alone, or train the denoiser only (`text_encoders: false`)"
        )


class EncodingCache:
    """The encodings of a data set's images and captions, for one backbone at a time.

    found: the data set, images not decoded. image_columns: each image of them is kept once, however many rows have it.
    kept: `latents`, or `all` with the text. where: the data set, for messages.
    """

    def __init__(self, found: Any, *, image_columns: list[str], caption_column: str, kept: Kept, where: str) -> None:
        self._found = found.select_columns(list(dict.fromkeys([*image_columns, caption_column])))
        self._image_columns, self._caption_column = image_columns, caption_column
        self._kept, self._where = kept, where
        self._backbone: Backbone | None = None
        self.frames: Frames | None = None
        """How each row's images are cut; None: to the backbone's own size."""

    def open(self, backbone: Backbone, adapters: Collection[Adapter], shard: Shard) -> None:
        """Encode what is missing for this backbone, sharing the work with all processes that do so now."""
        if backbone is self._backbone:
            return
        if self._kept == "all":
            check_text_stays(adapters, where=self._where)
        self._open_latents(backbone, shard)
        if self._kept == "all":
            self._open_text(backbone, shard)
        self._backbone = backbone

    def latents(self, number: int, column: str) -> Tensor:
        """Latents of the image in a row's column, bfloat16 [C, h, w] on the CPU; UserError if it was unreadable."""
        return self._latents[int(self._image_of[number, self._image_columns.index(column)])]["latents"]

    def text(self, captions: list[str], device: torch.device) -> Cond | None:
        """The encoded captions, float32, one row each; None if text is not kept."""
        if self._kept == "latents":
            return None
        rows = [self._text[self._caption_number[caption]] for caption in captions]
        cond = Cond.cat([_unpacked(row, caption) for row, caption in zip(rows, captions, strict=True)])
        pooled = None if cond.pooled is None else cond.pooled.to(device).float()
        mask = None if cond.mask is None else cond.mask.to(device)
        return replace(cond, embeds=cond.embeds.to(device).float(), pooled=pooled, mask=mask)

    def _open_latents(self, backbone: Backbone, shard: Shard) -> None:
        about = {"data": self._found._fingerprint, "columns": self._image_columns, "vae": backbone.identity("images")}
        if self.frames is not None:
            about["sizes"] = self.frames.digest
        folder = self._folder("latents", about, backbone)
        index = KeptRows(folder / "index", 1)
        index.make(lambda _: [self._index()], shard)
        self._image_of, self._first = index[0]["image_of"], index[0]["first"]
        self._latents = KeptRows(folder / "latents", len(self._first), rows_at_once=IMAGES_AT_ONCE)
        self._latents.make(lambda numbers: self._encode_images(numbers, backbone), shard)

    def _open_text(self, backbone: Backbone, shard: Shard) -> None:
        values = self._found[self._caption_column][:]
        captions = [caption for value in values for caption in (value if isinstance(value, list) else [value])]
        unique = list(dict.fromkeys(caption for caption in captions if isinstance(caption, str) and caption.strip()))
        self._caption_number = {caption: number for number, caption in enumerate(unique)}
        digest = hashlib.sha256(json.dumps(unique).encode()).hexdigest()
        folder = self._folder("text", {"captions": digest, "encoders": backbone.identity("text")}, backbone)
        self._text = KeptRows(folder / "captions", len(unique))
        self._text.make(lambda numbers: _encode_text([unique[number] for number in numbers], backbone), shard)

    def _folder(self, kind: str, about: dict[str, Any], backbone: Backbone) -> Path:
        """The folder of these encodings, with a note that says what they encode."""
        about |= {"format": FORMAT, "kind": kind}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        folder = cache_folder() / f"{kind}-{digest[:32]}"
        note = {"of": self._where, "backbone": backbone.name, "resolution": backbone.resolution} | about
        try:
            if not (folder / "about.json").exists():  # a complete cache may be on a read-only disk
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / "about.json", json.dumps(note, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"{folder}: it cannot be written ({error.strerror or error}); set AGSM_RL_CACHE to another folder"
            ) from error
        return folder

    def _index(self) -> dict[str, Tensor]:
        """`image_of` [rows, columns]: the number of each one's image; `first` [images, 2]: a row and column with it."""
        numbers: dict[object, int] = {}
        first: list[tuple[int, int]] = []
        image_of = torch.empty(len(self._found), len(self._image_columns), dtype=torch.int64)
        for row, values in enumerate(self._found):
            for column, name in enumerate(self._image_columns):
                same = _sameness(values[name], row, column)
                key = same if self.frames is None else (same, self.frames.size(row))
                number = numbers.setdefault(key, len(numbers))
                if number == len(first):
                    first.append((row, column))
                image_of[row, column] = number
        return {"image_of": image_of, "first": torch.tensor(first, dtype=torch.int64)}

    def _encode_images(self, numbers: list[int], backbone: Backbone) -> list[Content]:
        pixels: dict[Size, dict[int, Tensor]] = {}
        contents: dict[int, Content] = {}
        for number in numbers:
            row, column = self._first[number].tolist()
            name = self._image_columns[column]
            where = f"{self._where}, row {row}" + (f", column '{name}'" if len(self._image_columns) > 1 else "")
            try:
                picture = read_picture(self._found[row][name], where)
                size = size_of(backbone.resolution) if self.frames is None else self.frames.size(row)
                pixels.setdefault(size, {})[number] = fit(picture, size)
            except UserError as error:
                contents[number] = str(error)
        for same_size in pixels.values():
            latents = backbone.encode_images(torch.stack([*same_size.values()]).to(backbone.device))
            _check_finite(latents, f"{self._where}: the latents of its images", backbone)
            for number, one in zip(same_size, latents.bfloat16().cpu(), strict=True):
                contents[number] = {"latents": one.contiguous()}
        return [contents[number] for number in numbers]


def pack(embeds: Tensor) -> dict[str, Tensor]:
    """A prompt's rows [S, D] in bfloat16, without the zeros at each row's end (SD3's CLIPs are half as wide as its T5).

    `values` are the kept numbers one after another, `widths` [S] how many of each row, `width` is D.
    """
    embeds = embeds.bfloat16().cpu()
    ends = torch.arange(1, embeds.shape[1] + 1)
    widths = ((embeds != 0) * ends).amax(dim=1)
    values = embeds[ends <= widths[:, None]]
    return {"values": values, "widths": widths.int(), "width": torch.tensor(embeds.shape[1])}


def unpack(row: Mapping[str, Tensor]) -> Tensor:
    """The rows [S, D] that were packed, bfloat16."""
    inside = torch.arange(int(row["width"])) < row["widths"][:, None]
    embeds = torch.zeros(inside.shape, dtype=torch.bfloat16)
    embeds[inside] = row["values"]
    return embeds


def _encode_text(captions: list[str], backbone: Backbone) -> list[Content]:
    with own_precision(backbone.device):  # what is kept must not depend on which run made it
        cond = backbone.encode_text(captions)
    _check_finite(cond.embeds, "the encoded captions", backbone)
    rows = [pack(embeds) for embeds in cond.embeds]
    if cond.pooled is not None:
        for row, pooled in zip(rows, cond.pooled.bfloat16().cpu(), strict=True):
            row["pooled"] = pooled.contiguous()
    if cond.mask is not None:
        for row, mask in zip(rows, cond.mask.cpu(), strict=True):
            row["mask"] = mask.contiguous()
    return [*rows]


def _unpacked(row: Mapping[str, Tensor], caption: str) -> Cond:
    """One caption's row, bfloat16 on the CPU."""
    pooled, mask = (row[name][None] if name in row else None for name in ("pooled", "mask"))
    return Cond(unpack(row)[None], pooled, (caption,), mask=mask)


def _check_finite(encoded: Tensor, what: str, backbone: Backbone) -> None:
    if not torch.isfinite(encoded).all():
        raise UserError(
            f"{what} are not finite under {backbone.name}; float16 overflows in some encoders: set backbone.dtype to "
            "bfloat16 or float32"
        )


def _sameness(value: Any, row: int, column: int) -> object:
    """A key that two equal images share: their bytes or their path; for anything else, its place."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return hashlib.sha256(value).digest()
    return value if isinstance(value, str) else (row, column)
