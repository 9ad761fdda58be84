"""Image-caption pairs from any `datasets` data set, encoded to latents as they are drawn."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, PairBatch, Shard
from agsm_rl.policy import Policy
from agsm_rl.sources import images
from agsm_rl.sources.order import Order


class Pairs:
    """Batches of `batch_size` pairs (the total over all processes).

    `dataset`: `builtin:shapes`, a folder of images with metadata.jsonl or metadata.csv, a parquet file, or a name that
    `datasets.load_dataset` takes. Images are resized by their shorter side and cropped in the centre. The captions of a
    batch differ from each other where the data set allows it, because a batch's captions are each other's negatives.
    """

    gives: ClassVar[type[Batch]] = PairBatch

    def __init__(
        self,
        dataset: str,
        batch_size: int = 16,
        *,
        split: str = "train",
        image_column: str = "image",
        caption_column: str | None = None,
        num_images: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: got {batch_size}, but it must be 1 or more")
        if num_images is not None and num_images < 1:
            raise UserError(f"num_images: got {num_images}, but it must be 1 or more")
        self.dataset, self.batch_size, self.split, self.num_images = dataset, batch_size, split, num_images
        self.image_column, self.caption_column = image_column, caption_column

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Open the data set; UserError if it cannot be used."""
        if self.batch_size % shard.count:
            raise UserError(f"{name}: batch_size {self.batch_size} does not divide among {shard.count} processes")
        self._rows = images.open_pairs(self.dataset, split=self.split, num_images=self.num_images)
        self._columns = images.find_columns(self._rows, self.dataset, self.image_column, self.caption_column)
        if len(self._rows) < self.batch_size:
            raise UserError(
                f"dataset '{self.dataset}': it has {len(self._rows)} rows, fewer than batch_size {self.batch_size}; "
                f"lower batch_size or add images"
            )
        self._captions = self._rows[self._columns[1]]
        self._order = Order(len(self._rows), seed, name)
        self._shard = shard

    def next(self, policy: Policy) -> PairBatch:
        """The next pairs of this process, latents encoded by the policy's backbone."""
        chosen = self._order.take(self.batch_size, key=lambda row: str(self._captions[row]))
        share = self.batch_size // self._shard.count
        first = self._shard.index * share
        pairs = [
            images.read_row(self._rows, row, *self._columns, self.dataset) for row in chosen[first : first + share]
        ]
        backbone = policy.backbone
        pixels = torch.stack([images.fit(picture, backbone.resolution) for picture, _ in pairs])
        latents = backbone.encode_images(pixels.to(backbone.device))
        return PairBatch([caption for _, caption in pairs], torch.arange(first, first + share), latents)

    def metrics(self) -> dict[str, float]:
        """Pairs have none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read."""
        return {"position": self._order.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the kept position."""
        self._order.position = int(state["position"])
