"""How a data set's images are cut: the size of each one, read from its header and kept on disk, and its bucket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Shard
from agsm_rl.sources.buckets import Crop, assign, automatic_buckets, crop_of
from agsm_rl.sources.cache_folder import cache_folder
from agsm_rl.sources.kept_rows import KeptRows
from agsm_rl.sources.pictures import picture_size
from agsm_rl.training.sizes import Size, can_draw, check_drawable, size_of, step_of

AT_ONCE = 1000
"""Rows of the data set whose sizes are kept together."""
FORMAT = 1
"""Part of the key of kept sizes: raise it when they are read otherwise."""


class Frames:
    """The sizes of a data set's images, and the bucket of each row: all images of a row are cut to its size.

    Args:
        pictures: Height and width of each row's images, [N, images, 2]; 0 where an image cannot be read.
        columns: The images' columns.
        buckets: The sizes to choose from.
        batch_size: Rows that a bucket must have.
        usable: The rows that are drawn; None is all.
    """

    def __init__(
        self,
        pictures: NDArray[np.int64],
        columns: Sequence[str],
        buckets: Sequence[Size],
        *,
        batch_size: int,
        usable: Sequence[int] | None = None,
    ) -> None:
        self.buckets, self._pictures, self._columns = list(buckets), pictures, list(columns)
        drawn = None if usable is None else np.isin(np.arange(len(pictures)), usable)
        self.bucket_of = assign(pictures, buckets, batch_size=batch_size, usable=drawn)
        self.counts = np.bincount(self.bucket_of if drawn is None else self.bucket_of[drawn], minlength=len(buckets))

    def size(self, row: int) -> Size:
        """The size to which a row's images are cut."""
        return self.buckets[int(self.bucket_of[row])]

    def crop(self, row: int, column: str, picture: Image.Image | Tensor) -> Crop:
        """How the image in a row's column is cut; `picture` is the image, or what a cache kept of it."""
        if isinstance(picture, Image.Image):
            return crop_of(Size(picture.height, picture.width), self.size(row))
        height, width = self._pictures[row, self._columns.index(column)].tolist()
        return crop_of(Size(height, width), self.size(row))

    @property
    def digest(self) -> str:
        """What encodings of the cut images depend on."""
        sizes = [list(self.buckets[number]) for number in self.bucket_of.tolist()]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()

    def __str__(self) -> str:
        """The buckets by their numbers of rows."""
        order = sorted(range(len(self.buckets)), key=lambda number: (-int(self.counts[number]), number))
        return ", ".join(f"{self.buckets[number]}: {self.counts[number]}" for number in order if self.counts[number])


def buckets_for(backbone: Backbone, buckets: Sequence[Size] | str, *, where: str) -> list[Size]:
    """The sizes that a source's `buckets` means on this backbone; UserError for one that it cannot draw."""
    if isinstance(buckets, str):
        sizes = automatic_buckets(size_of(backbone.resolution), step_of(backbone))
        return [size for size in sizes if can_draw(backbone, size)]
    return [
        check_drawable(backbone, size.resolution, where=f"{where}: buckets[{number}]")
        for number, size in enumerate(buckets)
    ]


def read_sizes(found: Any, columns: Sequence[str], *, where: str, shard: Shard) -> NDArray[np.int64]:
    """Height and width of the images in these columns, [N, columns, 2]; 0 for one that cannot be read.

    They are kept on disk under the data set's fingerprint, and reading them is shared with the run's other processes.
    """
    images = found.select_columns(list(columns))
    about = {"data": found._fingerprint, "columns": list(columns), "format": FORMAT, "kind": "sizes"}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def read(part: int) -> Tensor:
        numbers = range(part * AT_ONCE, min((part + 1) * AT_ONCE, len(images)))
        rows = (images[number] for number in numbers)
        return torch.tensor([[_size(row[name], where) for name in columns] for row in rows])

    kept = KeptRows(cache_folder() / f"sizes-{digest[:32]}", ceil(len(images) / AT_ONCE), rows_at_once=1)
    kept.make(lambda parts: [{"sizes": read(part)} for part in parts], shard)
    sizes: NDArray[np.int64] = torch.cat([kept[part]["sizes"] for part in range(kept.count)]).numpy()
    return sizes


def _size(value: Any, where: str) -> tuple[int, int]:
    try:
        return picture_size(value, where)
    except UserError:  # reported, and replaced, when the row is read
        return 0, 0
