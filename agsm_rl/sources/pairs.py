"""Image-caption pairs from any `datasets` data set, encoded to latents as they are drawn."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, PairBatch, Shard
from agsm_rl.policy import Policy, Source
from agsm_rl.sources import images
from agsm_rl.sources.cache import EncodingCache, Kept, check_cache
from agsm_rl.sources.reading import Reader
from agsm_rl.sources.rows import Row, Rows, ShuffledRows, StreamedRows, own_share


class Pairs(Source):
    """Batches of image-caption pairs.

    Images are resized by their shorter side and cropped in the centre. The captions of a batch differ from each other
    where the data set allows it, because a batch's captions are each other's negatives.

    Args:
        dataset: `builtin:shapes`, a folder of images with metadata.jsonl or metadata.csv, a parquet file, or a name
            that `datasets.load_dataset` takes.
        batch_size: Pairs per step, the total over all processes.
        split: Split of the data set.
        image_column: Name of the column that holds the images.
        caption_column: Name of the column that holds the captions. Null looks for a usual one.
        num_images: Use only the first so many rows; null uses all.
        streaming: Read the data set as it comes, without downloading it first.
        shuffle_buffer: For streaming: rows that are held (encoded) and shuffled among themselves; 1 keeps the stream's
            order.
        cache: Keep what is encoded on disk for later epochs and runs (docs/cache.md): `latents`, or `all` with the
            text.
    """

    gives: type[Batch] = PairBatch
    batch_size: int

    def __init__(
        self,
        dataset: str,
        batch_size: int = 16,
        *,
        split: str = "train",
        image_column: str = "image",
        caption_column: str | None = None,
        num_images: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        cache: Kept | None = None,
    ) -> None:
        for option, value in {
            "batch_size": batch_size,
            "num_images": num_images,
            "shuffle_buffer": shuffle_buffer,
        }.items():
            if value is not None and value < 1:
                raise UserError(f"{option}: got {value}, but it must be 1 or more")
        self.dataset, self.batch_size, self.split, self.num_images = dataset, batch_size, split, num_images
        self.image_column, self.caption_column = image_column, caption_column
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.cache = check_cache(cache, streaming=streaming)

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Open the data set; UserError if it cannot be used."""
        self._own = own_share(self.batch_size, shard, name)
        found = images.open_dataset(
            self.dataset,
            split=self.split,
            num_rows=self.num_images,
            streaming=self.streaming,
            builtins={"builtin:shapes": _shapes},
        )
        there = images.column_names(found, self.dataset)
        self._columns = images.find_columns(there, self.dataset, self.image_column, self.caption_column)
        where = f"dataset '{self.dataset}'"
        self._rows: Rows
        self._encodings: EncodingCache | None = None
        if self.streaming:
            self._rows = StreamedRows(found, window=self.shuffle_buffer, seed=seed, name=name, where=where)
        elif len(found) < self.batch_size:
            raise UserError(
                f"{where}: it has {len(found)} rows, fewer than batch_size {self.batch_size}; lower batch_size or add "
                f"images"
            )
        else:
            image, caption = self._columns
            if self.cache is not None:
                self._encodings = EncodingCache(
                    found, image_columns=[image], caption_column=caption, kept=self.cache, where=where
                )
                found = found.select_columns([caption])
            self._rows = ShuffledRows(found, seed=seed, name=name)
        self._shard = shard
        self._reader = Reader(self._rows, self._read, shard=shard, where=where)

    def _read(self, row: Row) -> tuple[Image.Image | Tensor, str]:
        """The picture, or its kept latents; and the caption."""
        number, values = row
        where, (image_column, caption_column) = f"dataset '{self.dataset}', row {number}", self._columns
        caption = images.read_caption(values[caption_column], caption_column, where)
        if self._encodings is not None:
            return self._encodings.latents(number, image_column), caption
        return images.read_picture(values[image_column], where), caption

    def next(self, policy: Policy) -> PairBatch:
        """The next pairs of this process, latents encoded by the policy's backbone; unreadable rows are passed over.

        With a cache, the first batch waits until the whole data set is encoded.
        """
        backbone, cond = policy.backbone, None
        if self._encodings is not None:
            self._encodings.open(backbone, policy.adapters.values(), self._shard)
        found = self._reader.take(self.batch_size, self._own, device=backbone.device, distinct=self._columns[1])
        captions = [caption for _, caption in found]
        if self._encodings is not None:
            cond = self._encodings.text(captions, backbone.device)
        rows = torch.arange(self._own.start, self._own.stop)
        return PairBatch(captions, rows, images.to_latents([picture for picture, _ in found], backbone), cond=cond)

    def metrics(self) -> dict[str, float]:
        """How many unreadable rows were passed over, if any."""
        return self._reader.metrics()

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read."""
        return {**self._rows.state_dict(), "skipped": self._reader.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the kept position."""
        self._rows.load_state_dict({key: value for key, value in state.items() if key != "skipped"})
        self._reader.skipped = int(state.get("skipped", 0))


def _shapes(split: str, count: int) -> Any:
    from agsm_rl.shapes import data

    return data.pairs(split, count, seed=0)
