"""What pairs and preferences share: a data set that is opened, taken in order, read, and encoded once if asked to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Cond, Shard
from agsm_rl.policy import Policy
from agsm_rl.sources.bucket_order import BucketOrder
from agsm_rl.sources.buckets import Crop, check_buckets
from agsm_rl.sources.cache import EncodingCache, Kept, check_cache
from agsm_rl.sources.frames import Frames, buckets_for, read_sizes
from agsm_rl.sources.held_latents import HeldLatents
from agsm_rl.sources.images import Builtins, column_names, open_dataset
from agsm_rl.sources.order import Order
from agsm_rl.sources.pictures import read_picture
from agsm_rl.sources.read_ahead import ReadAhead, pays_off
from agsm_rl.sources.reading import Reader
from agsm_rl.sources.rows import Row, Rows, ShuffledRows, StreamedRows, own_share
from agsm_rl.training.sizes import Size, size_of

Read = TypeVar("Read")


class DataSet(Generic[Read]):
    """A source's data set: `open` it, say how its rows are read (`read_by`), then `take` batches.

    num_rows: only the first so many rows, named `rows_option` in messages. mirrors: whether pictures may be mirrored
    before they are resized. UserError for options out of range.
    """

    def __init__(
        self,
        name: str,
        *,
        batch_size: int,
        split: str,
        config: str | None,
        num_rows: int | None,
        rows_option: str,
        streaming: bool,
        shuffle_buffer: int,
        cache: Kept | None,
        mirrors: bool = False,
        buckets: Sequence[int | tuple[int, int]] | str | None = None,
    ) -> None:
        for option, value in {
            "batch_size": batch_size,
            rows_option: num_rows,
            "shuffle_buffer": shuffle_buffer,
        }.items():
            if value is not None and value < 1:
                raise UserError(f"{option}: got {value}, but it must be 1 or more")
        self.name, self.where, self.batch_size = name, f"dataset '{name}'", batch_size
        self.split, self.config, self.num_rows = split, config, num_rows
        self.streaming, self.shuffle_buffer, self._mirrors = streaming, shuffle_buffer, mirrors
        self.cache, self.buckets = check_cache(cache, streaming=streaming), check_buckets(buckets)
        if self.buckets and streaming:
            raise UserError(
                "buckets: the images of a streamed data set have no sizes that are known beforehand; leave out "
                "`streaming`, or `buckets`"
            )
        self.frames: Frames | None = None
        """How its images are cut to buckets, once that is known; None: all to the backbone's own size."""
        self.held: HeldLatents | None = None
        """Latents that were encoded before; None: nothing is held, such as of a stream, whose rows have no numbers."""
        self._to_load: dict[str, Any] | None = None
        self.batches = 0
        """Batches taken since the run began."""

    def open(self, name: str, seed: int, shard: Shard, *, builtins: Builtins) -> list[str]:
        """Open it for a source called `name` in the run, and return its columns' names."""
        self._own = own_share(self.batch_size, shard, name)
        self._name, self._seed, self._shard = name, seed, shard
        self.frames = self._to_load = None
        self.found = open_dataset(
            self.name,
            split=self.split,
            config=self.config,
            num_rows=self.num_rows,
            streaming=self.streaming,
            builtins=builtins,
        )
        return column_names(self.found, self.name)

    def read_by(
        self,
        read: Callable[[Row], Read],
        *,
        image_columns: list[str],
        caption_column: str,
        usable: list[int] | None = None,
        is_usable: Callable[[Row], bool] | None = None,
    ) -> None:
        """Read rows by `read`, which raises UserError for a row that cannot be used.

        usable: the rows to choose from, of a data set that has numbers; `is_usable` says so of a stream's row. None is
        all. UserError where fewer than a batch are left.
        """
        self._caption_column, self._image_columns = caption_column, image_columns
        self._encodings: EncodingCache | None = None
        self._usable = usable
        self._rows: Rows
        if self.streaming:
            self._rows = StreamedRows(
                self.found,
                window=self.shuffle_buffer,
                seed=self._seed,
                name=self._name,
                where=self.where,
                keep=is_usable,
            )
        else:
            self._rows = self._shuffled(image_columns, caption_column, usable)
        self._read = read
        self._reader = Reader(self._rows, read, shard=self._shard, where=self.where)
        self._ahead = ReadAhead(lambda number: self.found[number])

    def _shuffled(self, image_columns: list[str], caption_column: str, usable: list[int] | None) -> ShuffledRows:
        found = self.found
        count = len(found) if usable is None else len(usable)
        if count < self.batch_size:
            ties = f" that are not ties ({len(found) - count} are)" if count < len(found) else ""
            raise UserError(
                f"{self.where}: it has {count} rows{ties}, fewer than batch_size {self.batch_size}; lower batch_size "
                "or add rows"
            )
        if self.cache is not None:
            self._encodings = EncodingCache(
                found, image_columns=image_columns, caption_column=caption_column, kept=self.cache, where=self.where
            )
            found = found.remove_columns(_pictures(found, image_columns))
        return ShuffledRows(found, Order(count, self._seed, self._name), kept=usable)

    def fit_to(self, backbone: Backbone) -> None:
        """Sort the rows into the buckets that the backbone can draw; UserError where it cannot draw one of them."""
        if self.buckets is None or self.frames is not None:
            return
        sizes = buckets_for(backbone, self.buckets, where=self._name)
        self._is_rehearsed = backbone.device.type == "meta"
        pictures = read_sizes(self.found, self._image_columns, where=self.where, shard=self._shard)
        self.frames = Frames(pictures, self._image_columns, sizes, batch_size=self.batch_size, usable=self._usable)
        if self._shard.index == 0 and not self._is_rehearsed:
            print(f"agsm-rl: {self.where}: rows of each bucket, height x width: {self.frames}", file=sys.stderr)
        if self._encodings is not None:
            self._encodings.frames = self.frames
        bucket_of = self.frames.bucket_of if self._usable is None else self.frames.bucket_of[self._usable]
        assert isinstance(self._rows, ShuffledRows)
        self._rows.order = BucketOrder(bucket_of.tolist(), self._seed, self._name)
        if self._to_load is not None:
            self._rows.load_state_dict(self._to_load)

    @property
    def size(self) -> Size | None:
        """The size of the newest batch's images; None: the backbone's own. A rehearsal of memory sees the largest."""
        if self.frames is None:
            return None
        if self._is_rehearsed:
            return max(self.frames.buckets, key=lambda size: size.area)
        assert isinstance(self._rows, ShuffledRows)
        return self.frames.size(self._rows.newest)

    def take(self, policy: Policy, *, distinct: str | None = None) -> tuple[list[Read], Tensor]:
        """This process's rows of the next batch, read, and their numbers in the batch.

        Unreadable rows are replaced. With `distinct`, values of that column differ where possible. With a cache, the
        first batch waits until the whole data set is encoded.
        """
        self.fit_to(policy.backbone)
        if self.held is not None:
            self.held.open(policy.backbone)
        if self._encodings is not None:
            self._encodings.open(policy.backbone, policy.adapters.values(), self._shard)
        rows = self._reader.take(self.batch_size, self._own, device=policy.backbone.device, distinct=distinct)
        self.batches += 1
        self._begin_next(policy.backbone, distinct)
        return rows, torch.arange(self._own.start, self._own.stop)

    def _begin_next(self, backbone: Backbone, distinct: str | None) -> None:
        """Have the pictures of the next batch read while this one is learned from."""
        if self._encodings is not None or not isinstance(self._rows, ShuffledRows) or not pays_off(backbone.device):
            return
        numbers = self._rows.upcoming(self.batch_size, self._own, distinct=distinct)
        places = [(number, column) for number in numbers for column in self._image_columns]
        new = [place for place in places if self.held is None or self.held.get(place) is None]
        # How a picture is cut to a bucket depends on its own size, and a mirrored one may be rounded otherwise.
        self._ahead.begin(new, size_of(backbone.resolution) if self.frames is None and not self._mirrors else None)

    def picture(self, row: Row, column: str, where: str) -> Image.Image | Tensor:
        """The picture in a row's column, or its kept or held latents."""
        number, values = row
        if self._encodings is not None:
            return self._encodings.latents(number, column)
        held = None if self.held is None else self.held.get((number, column))
        if held is not None:
            return held
        ahead = self._ahead.take((number, column))
        return read_picture(values[column], where) if ahead is None else ahead

    def crop(self, row: Row, column: str, picture: Image.Image | Tensor) -> Crop | None:
        """How the picture in a row's column is cut; None without buckets."""
        return None if self.frames is None else self.frames.crop(row[0], column, picture)

    def captions(self) -> list[str] | None:
        """All captions that it holds; None for a stream."""
        if self.streaming:
            return None
        values = self.found.select_columns([self._caption_column])[self._caption_column][:]
        texts = (text for value in values for text in (value if isinstance(value, list) else [value]))
        return [text for text in texts if isinstance(text, str)]

    def cond(self, captions: list[str], policy: Policy) -> Cond | None:
        """The captions' kept encodings; None where none are kept."""
        return None if self._encodings is None else self._encodings.text(captions, policy.backbone.device)

    def metrics(self) -> dict[str, float]:
        """`rows_skipped`: how many unreadable rows were replaced, if any."""
        return self._reader.metrics()

    @property
    def passed_over(self) -> int:
        """Rows of a stream that were not usable, so far."""
        return self._rows.passed_over if isinstance(self._rows, StreamedRows) else 0

    def state_dict(self) -> dict[str, Any]:
        """How far it was read."""
        return {**self._rows.state_dict(), "skipped": self._reader.skipped, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there; UserError where the state is of a stream and this is not, or the other way round."""
        ours = ("skipped", "batches")  # checkpoints of earlier versions lack them
        rows = {key: value for key, value in state.items() if key not in ours}
        if self.buckets is not None and self.frames is None:
            self._to_load = rows  # until the backbone's sizes are known
        else:
            self._rows.load_state_dict(rows)
        self._reader.skipped, self.batches = (int(state.get(key, 0)) for key in ours)


def _pictures(found: Any, image_columns: list[str]) -> list[str]:
    """The columns that are slow to read and no longer needed once the images are encoded."""
    import datasets

    return [name for name, kind in found.features.items() if name in image_columns or isinstance(kind, datasets.Image)]
