"""Image-caption pairs from any data set of images, encoded to latents as they are drawn."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Backbone, Batch, PairBatch, Shard
from agsm_rl.policy import Policy, Source
from agsm_rl.sources.buckets import Crop, crops_of
from agsm_rl.sources.cache import Kept
from agsm_rl.sources.data_set import DataSet
from agsm_rl.sources.held_latents import HeldLatents
from agsm_rl.sources.images import find_columns, read_captions
from agsm_rl.sources.other_columns import other_columns
from agsm_rl.sources.rows import Row
from agsm_rl.sources.variation import Latents, Variation
from agsm_rl.training.randomness import Draw, stream
from agsm_rl.training.sizes import Buckets

Choice = Literal["first", "random"]
CAPTIONS_OF = {
    "builtin:shapes": ("plain", "careful", "web"),
    "builtin:scenes": ("plain", "careful", "careless", "coco", "mixed"),
}
"""How the captions of the drawn worlds may be written. (Their modules are loaded only when they are drawn.)"""


class Pairs(Source):
    """Batches of image-caption pairs.

    Images are resized and cropped in the centre to the backbone's resolution; transparent pixels become white. The
    captions of a batch differ from each other where the data set allows it, because a batch's captions are each other's
    negatives.

    Args:
        dataset: `builtin:shapes` or `builtin:scenes`; a folder of images with metadata.jsonl or metadata.csv
            (`file_name`, `caption`) or with a NAME.txt beside each NAME.png; a parquet file or a folder of them; a csv
            or jsonl table; a zip or tar archive; or a name on the hub (`owner/name`).
        batch_size: Pairs per step, the total over all processes.
        split: Split of the data set.
        config: Configuration of a data set that has several.
        image_column: Name of the column that holds the images.
        caption_column: Name of the column that holds the captions. Null looks for a usual one.
        caption: Of an image with several captions, learn from the `first`, or from a `random` one each time.
        caption_dropout: Share of captions in [0, 1) that is replaced by the empty prompt, anew each time.
        latents: The VAE's `mode`, the mean of what it knows of an image, which can be cached; or a `sample` of it, new
            each time, as AGSM's and Diffusion-DPO's authors take.
        horizontal_flip: Mirror every other image at random, anew each time. Captions that say left or right then lie.
        num_images: Use only the first so many rows; null uses all.
        streaming: Read the data set as it comes, without downloading it first.
        shuffle_buffer: For streaming: rows that are held (encoded) and shuffled among themselves; 1 keeps the stream's
            order.
        cache: Keep what is encoded on disk for later epochs and runs (docs/cache.md): `latents`, or `all` with the
            text.
        captions: Of a drawn world, how its captions are written (docs/scenes.md): `plain` (null), `careful`; of
            `builtin:scenes` also `careless`, `coco` and `mixed`; of `builtin:shapes` also `web`.
        buckets: Sizes that images are cut to, as a list of numbers or [height, width], `[1024, [768, 1344]]`; `auto`:
            sizes of about the area of the backbone's resolution in all shapes. Each image goes where it loses least; a
            batch is of one size. SDXL is told each image's true size and crop. Null: the backbone's resolution.
    """

    gives: type[Batch] = PairBatch
    batch_size: int

    def __init__(
        self,
        dataset: str,
        batch_size: int = 16,
        *,
        split: str = "train",
        config: str | None = None,
        image_column: str = "image",
        caption_column: str | None = None,
        caption: Choice = "first",
        caption_dropout: float = 0.0,
        latents: Latents = "mode",
        horizontal_flip: bool = False,
        num_images: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        cache: Kept | None = None,
        captions: str | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        if caption not in get_args(Choice):
            raise unknown_name("caption", caption, "a choice among an image's captions", get_args(Choice))
        self.variation = Variation(
            caption_dropout=caption_dropout, latents=latents, horizontal_flip=horizontal_flip, cache=cache
        )
        self._data: DataSet[tuple[int, Image.Image | Tensor, list[str], dict[str, Any], Crop | None]] = DataSet(
            dataset,
            batch_size=batch_size,
            split=split,
            config=config,
            num_rows=num_images,
            rows_option="num_images",
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
            cache=cache,
            mirrors=horizontal_flip,
            buckets=buckets,
        )
        if self.variation.is_fixed and not streaming and cache is None:
            self._data.held = HeldLatents()
        self.batch_size, self.cache = batch_size, self._data.cache
        self.image_column, self.caption_column, self.caption = image_column, caption_column, caption
        self.captions = self._check_captions(dataset, captions)

    @staticmethod
    def _check_captions(dataset: str, captions: str | None) -> str:
        """How a drawn world's captions are written; UserError for another data set or an unknown way."""
        allowed = CAPTIONS_OF.get(dataset)
        if captions is not None and allowed is None:
            raise UserError(
                f"pairs: captions: '{dataset}' has captions of its own; leave `captions` out, which is for "
                f"{' and '.join(CAPTIONS_OF)}"
            )
        if captions is not None and captions not in (allowed or ()):
            raise unknown_name("captions", captions, f"a kind of captions of {dataset}", allowed or ())
        return captions or "plain"

    def _builtins(self) -> dict[str, Callable[[str, int], Any]]:
        return {name: _drawn(name, self.captions) for name in CAPTIONS_OF}

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Open the data set; UserError if it cannot be used."""
        self._name, self._seed = name, seed
        columns = self._data.open(name, seed, shard, builtins=self._builtins())
        self._columns = find_columns(columns, self._data.name, self.image_column, self.caption_column)
        self._data.read_by(self._read, image_columns=[self._columns[0]], caption_column=self._columns[1])

    def fit_to(self, backbone: Backbone) -> None:
        """Sort the images into `buckets`; UserError where the backbone cannot draw one of them."""
        self._data.fit_to(backbone)

    def _read(self, row: Row) -> tuple[int, Image.Image | Tensor, list[str], dict[str, Any], Crop | None]:
        """The row's number; the picture, or its latents; its captions; the other columns; how the picture is cut."""
        number, values = row
        where, (image_column, caption_column) = f"{self._data.where}, row {number}", self._columns
        captions = read_captions(values[caption_column], caption_column, where)
        picture = self._data.picture(row, image_column, where)
        crop = self._data.crop(row, image_column, picture)
        return number, picture, captions, other_columns(values, self._columns), crop

    def next(self, policy: Policy) -> PairBatch:
        """The next pairs of this process, latents encoded by the policy's backbone; unreadable rows are replaced.

        With a cache, the first batch waits until the whole data set is encoded.
        """
        batch = self._data.batches
        read, rows = self._data.take(policy, distinct=self._columns[1])
        numbers, pictures, texts, metadata, cuts = zip(*read, strict=True)
        captions = [self._choose(choice, batch, row) for choice, row in zip(texts, rows.tolist(), strict=True)]
        draw = Draw(self._seed, self._name, batch)
        captions = self.variation.captions(captions, draw, rows)
        latents = self.variation.encoded(pictures, policy.backbone, draw, rows, size=self._data.size)
        if self._data.held is not None:
            self._data.held.hold([(number, self._columns[0]) for number in numbers], latents)
        return PairBatch(
            captions,
            rows,
            latents,
            cond=self._data.cond(captions, policy),
            metadata=list(metadata),
            crops=crops_of(cuts, policy.backbone.device),
        )

    def _choose(self, captions: list[str], batch: int, row: int) -> str:
        """One of an image's captions, fixed by the batch's and the row's number."""
        if self.caption == "first" or len(captions) == 1:
            return captions[0]
        return captions[int(stream(self._seed, f"{self._name}/caption", batch, row).integers(len(captions)))]

    def prompt_texts(self) -> list[str] | None:
        """The data set's captions; None for a stream."""
        return self._data.captions()

    def metrics(self) -> dict[str, float]:
        """How many unreadable rows were replaced, if any."""
        return self._data.metrics()

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read."""
        return self._data.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at that position."""
        self._data.load_state_dict(state)


def _drawn(name: str, captions: str) -> Callable[[str, int], Any]:
    """Draws the pairs of a world."""

    def draw(split: str, count: int) -> Any:
        from agsm_rl.shapes import data

        return data.pairs(split, count, seed=0, captions=captions, world=data.PAIRS[name])

    return draw
