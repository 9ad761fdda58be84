"""Preferences of a data set: two images for one prompt, the better one known; encoded to latents as they are drawn.

Two conventions are recognised by their columns: TRL's and Pick-a-Pic's (arXiv 2305.01569).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Batch, PreferenceBatch, Shard
from agsm_rl.policy import Policy, Source
from agsm_rl.sources.buckets import Crop, crops_of
from agsm_rl.sources.cache import Kept
from agsm_rl.sources.data_set import DataSet
from agsm_rl.sources.images import read_captions
from agsm_rl.sources.other_columns import other_columns
from agsm_rl.sources.rows import Row
from agsm_rl.sources.variation import Latents, Variation
from agsm_rl.training.randomness import Draw
from agsm_rl.training.sizes import Buckets

BUILTINS = ("builtin:shapes-preferences", "builtin:scenes-preferences")
Picture = Image.Image | Tensor
"""A picture, or the latents that a cache kept of it."""
Cut = tuple[Picture, Crop | None]
"""A picture, and how it is cut, with buckets."""


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
    0 prefers jpg_1. Ties (0.5, or no label) are dropped; the metric `ties_dropped` counts them. Images are resized and
    cropped in the centre to the backbone's resolution; transparent pixels become white.

    Args:
        dataset: `builtin:shapes-preferences` or `builtin:scenes-preferences`, a folder of images with metadata, a
            parquet file or a folder of them, a csv or jsonl table, a zip or tar archive, or a name on the hub
            (`owner/name`).
        batch_size: Preferences per step, the total over all processes.
        split: Split of the data set.
        config: Configuration of a data set that has several.
        caption_dropout: Share of prompts in [0, 1) that is replaced by the empty prompt, anew each time. Published by
            Diffusion-DPO: 0.2.
        latents: The VAE's `mode`, the mean of what it knows of an image, which can be cached; or a `sample` of it, new
            each time, as Diffusion-DPO's authors take.
        horizontal_flip: Mirror each image, chosen or rejected, with even chance, anew each time, as Diffusion-DPO's
            authors do. Prompts that say left or right then lie.
        num_pairs: Use only the first so many rows; null uses all.
        streaming: Read the data set as it comes, without downloading it first.
        shuffle_buffer: For streaming: rows that are held (encoded; 1000 of Pick-a-Pic are about 330 MB) and shuffled
            among themselves; 1 keeps the stream's order.
        cache: Keep what is encoded on disk for later epochs and runs (docs/cache.md): `latents`, or `all` with the
            text.
        buckets: Sizes that images are cut to, as a list of numbers or [height, width], `[1024, [768, 1344]]`; `auto`:
            sizes of about the area of the backbone's resolution in all shapes. Each pair goes where both lose least; a
            batch is of one size. SDXL is told each image's true size and crop. Null: the backbone's resolution.
    """

    gives: type[Batch] = PreferenceBatch
    batch_size: int

    def __init__(
        self,
        dataset: str,
        batch_size: int = 16,
        *,
        split: str = "train",
        config: str | None = None,
        caption_dropout: float = 0.0,
        latents: Latents = "mode",
        horizontal_flip: bool = False,
        num_pairs: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        cache: Kept | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self._data: DataSet[tuple[str, Cut, Cut, dict[str, Any]]] = DataSet(
            dataset,
            batch_size=batch_size,
            split=split,
            config=config,
            num_rows=num_pairs,
            rows_option="num_pairs",
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
            cache=cache,
            mirrors=horizontal_flip,
            buckets=buckets,
        )
        self.variation = Variation(
            caption_dropout=caption_dropout, latents=latents, horizontal_flip=horizontal_flip, cache=cache
        )
        self.batch_size, self.cache = batch_size, self._data.cache

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Open the data set; UserError if it cannot be used."""
        self._name, self._seed = name, seed
        data = self._data
        columns = data.open(name, seed, shard, builtins={builtin: _drawn(builtin) for builtin in BUILTINS})
        self._columns = find_preference_columns(columns, data.name)
        usable = None if data.streaming else self._without_ties(data.found)
        self._ties = 0 if usable is None else len(data.found) - len(usable)
        data.read_by(
            self._read,
            image_columns=[self._columns.first, self._columns.second],
            caption_column=self._columns.prompt,
            usable=usable,
            is_usable=self._has_preference,
        )

    def fit_to(self, backbone: Backbone) -> None:
        """Sort the preferences into `buckets`; UserError where the backbone cannot draw one of them."""
        self._data.fit_to(backbone)

    def _without_ties(self, found: Any) -> list[int]:
        column = self._columns.label
        if column is None:
            return list(range(len(found)))
        labels = enumerate(found[column][:])
        return [number for number, label in labels if self._has_preference((number, {column: label}))]

    def _has_preference(self, row: Row) -> bool:
        return self._preferred(row) is not None

    def _preferred(self, row: Row) -> int | None:
        """0 where the first image is preferred, 1 where the second is, None at a tie; UserError for another label."""
        number, values = row
        column = self._columns.label
        if column is None:
            return 0
        label = values[column]
        if isinstance(label, str):  # a cell of a csv table
            label = {"": None, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "0.5": 0.5}.get(label.strip(), label)
        if label is None or label == 0.5:
            return None
        if label not in (0, 1):
            raise UserError(
                f"{self._data.where}, row {number}: column '{column}' holds {label!r}, but a label is 1 (the first "
                "image is preferred), 0 (the second) or 0.5 (a tie); fix or remove that row"
            )
        return 0 if label == 1 else 1

    def _read(self, row: Row) -> tuple[str, Cut, Cut, dict[str, Any]]:
        """The prompt, the chosen and the rejected image (or these images' kept latents), and the other columns."""
        number, values = row
        where, columns = f"{self._data.where}, row {number}", self._columns
        prompt = read_captions(values[columns.prompt], columns.prompt, where)[0]
        pictures = [
            (column, self._data.picture(row, column, f"{where}, column '{column}'"))
            for column in (columns.first, columns.second)
        ]
        first, second = ((picture, self._data.crop(row, column, picture)) for column, picture in pictures)
        chosen, rejected = (first, second) if self._preferred(row) == 0 else (second, first)
        return prompt, chosen, rejected, other_columns(values, str(columns).split(", "))

    def next(self, policy: Policy) -> PreferenceBatch:
        """The next preferences of this process, latents encoded by the policy's backbone; unreadable rows are replaced.

        With a cache, the first batch waits until the whole data set is encoded.
        """
        draw = Draw(self._seed, self._name, self._data.batches)
        read, rows = self._data.take(policy)
        prompts = self.variation.captions([prompt for prompt, _, _, _ in read], draw, rows)
        both = {"chosen": [image for _, image, _, _ in read], "rejected": [image for _, _, image, _ in read]}
        backbone, size = policy.backbone, self._data.size
        chosen, rejected = (
            self.variation.encoded(
                [picture for picture, _ in images], backbone, draw, rows, which=f" {which}", size=size
            )
            for which, images in both.items()
        )
        chosen_crops, rejected_crops = (
            crops_of([crop for _, crop in images], backbone.device) for images in both.values()
        )
        metadata: list[Mapping[str, Any]] = [columns for _, _, _, columns in read]
        return PreferenceBatch(
            prompts,
            rows,
            chosen,
            rejected,
            cond=self._data.cond(prompts, policy),
            metadata=metadata,
            chosen_crops=chosen_crops,
            rejected_crops=rejected_crops,
        )

    def prompt_texts(self) -> list[str] | None:
        """The data set's captions; None for a stream."""
        return self._data.captions()

    def metrics(self) -> dict[str, float]:
        """`ties_dropped`, of the whole data set or of a stream so far (left out where there are no labels), and
        `rows_skipped`, how many unreadable rows were replaced, if any."""
        if self._columns.label is None:
            return self._data.metrics()
        return {"ties_dropped": float(self._ties + self._data.passed_over)} | self._data.metrics()

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read."""
        return self._data.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at that position."""
        self._data.load_state_dict(state)


def find_preference_columns(names: list[str], dataset: str) -> Columns:
    """Whose convention the columns follow; UserError lists the data set's columns."""
    for columns in (TRL, PICK_A_PIC):
        if set(str(columns).split(", ")) <= set(names):
            return columns
    raise UserError(
        f"dataset '{dataset}': it has no columns of preferences; it has: {', '.join(names)}. Name them {TRL} (as TRL "
        f"does), or {PICK_A_PIC} (as Pick-a-Pic does)"
    )


def _drawn(name: str) -> Callable[[str, int], Any]:
    """Draws the preferences of a world."""

    def draw(split: str, count: int) -> Any:
        from agsm_rl.shapes import data

        return data.preferences(split, count, seed=0, world=data.PREFERENCES[name])

    return draw
