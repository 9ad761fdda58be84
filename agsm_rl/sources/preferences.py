"""Preferences of a data set: two images for one prompt, the better one known; encoded to latents as they are drawn.

Two conventions are read as they are, told by their columns: TRL's and Pick-a-Pic's (arXiv 2305.01569).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, PreferenceBatch, Shard
from agsm_rl.policy import Policy, Source
from agsm_rl.sources import images
from agsm_rl.sources.cache import EncodingCache, Kept, check_cache
from agsm_rl.sources.reading import Reader
from agsm_rl.sources.rows import Row, ShuffledRows, StreamedRows, own_share


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. Without a `label`, the first image is the better one."""

    prompt: str
    first: str
    second: str
    label: str | None = None

    def __str__(self) -> str:
        return ", ".join(name for name in (self.prompt, self.first, self.second, self.label) if name)


TRL = Columns("prompt", "chosen", "rejected")
PICK_A_PIC = Columns("caption", "jpg_0", "jpg_1", "label_0")


class Preferences(Source):
    """Batches of preferences: two images for one prompt, the better one known.

    Columns are TRL's `prompt`, `chosen`, `rejected` (a folder's metadata names the files as `chosen_file_name`,
    `rejected_file_name`), or Pick-a-Pic's `caption`, `jpg_0`, `jpg_1`, `label_0`, where a label of 1 prefers jpg_0 and
    0 prefers jpg_1. Ties (0.5, or no label) are dropped; the metric `ties_dropped` counts them. Images are resized by
    their shorter side and cropped in the centre.

    Args:
        dataset: `builtin:shapes-preferences`, a folder of images with metadata, a parquet file, or a name that
            `datasets.load_dataset` takes.
        batch_size: Preferences per step, the total over all processes.
        split: Split of the data set.
        num_pairs: Use only the first so many rows; null uses all.
        streaming: Read the data set as it comes, without downloading it first.
        shuffle_buffer: For streaming: rows that are held (encoded; 1000 of Pick-a-Pic are about 330 MB) and shuffled
            among themselves; 1 keeps the stream's order.
        cache: Keep what is encoded on disk for later epochs and runs (docs/cache.md): `latents`, or `all` with the
            text.
    """

    gives: type[Batch] = PreferenceBatch
    batch_size: int

    def __init__(
        self,
        dataset: str,
        batch_size: int = 16,
        *,
        split: str = "train",
        num_pairs: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        cache: Kept | None = None,
    ) -> None:
        for option, value in {
            "batch_size": batch_size,
            "num_pairs": num_pairs,
            "shuffle_buffer": shuffle_buffer,
        }.items():
            if value is not None and value < 1:
                raise UserError(f"{option}: got {value}, but it must be 1 or more")
        self.dataset, self.batch_size, self.split, self.num_pairs = dataset, batch_size, split, num_pairs
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.cache = check_cache(cache, streaming=streaming)

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Open the data set; UserError if it cannot be used."""
        self._own = own_share(self.batch_size, shard, name)
        found = images.open_dataset(
            self.dataset,
            split=self.split,
            num_rows=self.num_pairs,
            streaming=self.streaming,
            builtins={"builtin:shapes-preferences": _shapes},
        )
        self._columns = find_preference_columns(images.column_names(found, self.dataset), self.dataset)
        self._ties = 0
        self._shard = shard
        self._encodings: EncodingCache | None = None
        where = f"dataset '{self.dataset}'"
        self._rows: ShuffledRows | StreamedRows
        if self.streaming:
            self._rows = StreamedRows(
                found, window=self.shuffle_buffer, seed=seed, name=name, where=where, keep=self._has_preference
            )
            self._reader = Reader(self._rows, self._read, shard=shard, where=where)
            return
        kept = self._without_ties(found)
        if len(kept) < self.batch_size:
            ties = f" that are no ties ({self._ties} are)" if self._ties else ""
            raise UserError(
                f"dataset '{self.dataset}': it has {len(kept)} rows{ties}, fewer than batch_size {self.batch_size}; "
                f"lower batch_size or add preferences"
            )
        if self.cache is not None:
            columns = self._columns
            self._encodings = EncodingCache(
                found,
                image_columns=[columns.first, columns.second],
                caption_column=columns.prompt,
                kept=self.cache,
                where=where,
            )
            found = found.select_columns([columns.prompt, *([columns.label] if columns.label else [])])
        self._rows = ShuffledRows(found, seed=seed, name=name, kept=kept)
        self._reader = Reader(self._rows, self._read, shard=shard, where=where)

    def _without_ties(self, found: Any) -> list[int]:
        column = self._columns.label
        if column is None:
            return list(range(len(found)))
        labels = enumerate(found[column][:])
        kept = [number for number, label in labels if self._has_preference((number, {column: label}))]
        self._ties = len(found) - len(kept)
        return kept

    def _has_preference(self, row: Row) -> bool:
        return self._preferred(row) is not None

    def _preferred(self, row: Row) -> int | None:
        """0 where the first image is preferred, 1 where the second is, None at a tie; UserError for another label."""
        number, values = row
        column = self._columns.label
        if column is None:
            return 0
        label = values[column]
        if label is None or label == 0.5:
            return None
        if label not in (0, 1):
            raise UserError(
                f"dataset '{self.dataset}', row {number}: column '{column}' holds {label!r}, but a label is 1 (the "
                f"first image is preferred), 0 (the second) or 0.5 (a tie); mend or remove that row"
            )
        return 0 if label == 1 else 1

    def _read(self, row: Row) -> tuple[str, Image.Image | Tensor, Image.Image | Tensor]:
        """The prompt, the chosen and the rejected image, or these images' kept latents."""
        number, values = row
        where, columns = f"dataset '{self.dataset}', row {number}", self._columns
        prompt = images.read_caption(values[columns.prompt], columns.prompt, where)
        first, second = (
            images.read_picture(values[name], f"{where}, column '{name}'")
            if self._encodings is None
            else self._encodings.latents(number, name)
            for name in (columns.first, columns.second)
        )
        return (prompt, first, second) if self._preferred(row) == 0 else (prompt, second, first)

    def next(self, policy: Policy) -> PreferenceBatch:
        """The next preferences of this process, latents encoded by the policy's backbone; as with pairs, unreadable
        rows are passed over."""
        backbone, cond = policy.backbone, None
        if self._encodings is not None:
            self._encodings.open(backbone, policy.adapters.values(), self._shard)
        found = self._reader.take(self.batch_size, self._own, device=backbone.device)
        prompts = [prompt for prompt, _, _ in found]
        if self._encodings is not None:
            cond = self._encodings.text(prompts, backbone.device)
        chosen = images.to_latents([picture for _, picture, _ in found], backbone)
        rejected = images.to_latents([picture for _, _, picture in found], backbone)
        rows = torch.arange(self._own.start, self._own.stop)
        return PreferenceBatch(prompts, rows, chosen, rejected, cond=cond)

    def metrics(self) -> dict[str, float]:
        """How many ties were dropped, of the whole data set or of a stream so far (none where there are no labels); how
        many unreadable rows were passed over, if any."""
        if self._columns.label is None:
            return self._reader.metrics()
        streamed = self._rows.passed_over if isinstance(self._rows, StreamedRows) else 0
        return {"ties_dropped": float(self._ties + streamed)} | self._reader.metrics()

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read."""
        return {**self._rows.state_dict(), "skipped": self._reader.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the kept position."""
        self._rows.load_state_dict({key: value for key, value in state.items() if key != "skipped"})
        self._reader.skipped = int(state.get("skipped", 0))


def find_preference_columns(there: list[str], dataset: str) -> Columns:
    """Whose convention the columns follow; UserError names the columns that there are."""
    for columns in (TRL, PICK_A_PIC):
        if set(str(columns).split(", ")) <= set(there):
            return columns
    raise UserError(
        f"dataset '{dataset}': it has no preferences' columns; it has: {', '.join(there)}. Name them {TRL} (as TRL "
        f"does), or {PICK_A_PIC} (as Pick-a-Pic does)"
    )


def _shapes(split: str, count: int) -> Any:
    from agsm_rl.shapes import data

    return data.preferences(split, count, seed=0)
