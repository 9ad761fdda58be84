"""Open image data sets by name and bring their images to the backbone's size: everything through `datasets`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone

CAPTION_COLUMNS = ("caption", "text", "prompt")
BUILTIN_ROWS = 4000

Builtins = Mapping[str, Callable[[str, int], Any]]
"""A builtin's name → what draws its rows of a split."""


def open_dataset(dataset: str, *, split: str, num_rows: int | None, streaming: bool, builtins: Builtins) -> Any:
    """The data set named by a builtin, a folder of images with metadata, a parquet file, or a name `datasets` knows.

    A `datasets.Dataset`, or its `IterableDataset` with `streaming`; images are left encoded (`read_picture` decodes
    them). UserError when there is no such thing or it is empty. Data sets that need a loading script are not loaded.
    """
    if not dataset.startswith("builtin:"):
        found = _load(dataset, split, streaming)
    elif dataset in builtins:
        found = builtins[dataset](split, num_rows or BUILTIN_ROWS)
        found = found.to_iterable_dataset() if streaming else found
    else:
        raise UserError(f"dataset '{dataset}': the only builtin here is {', '.join(map(repr, builtins))}")
    if num_rows is not None:
        found = found.take(num_rows) if streaming else found.select(range(min(num_rows, len(found))))
    if not streaming and not len(found):
        raise UserError(
            f"dataset '{dataset}', split '{split}': it has no rows; give one with at least a batch of images"
        )
    return _encoded(found)


def _load(dataset: str, split: str, streaming: bool) -> Any:
    import datasets

    path = Path(dataset)
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its tracebacks; what they say is in our message
    try:
        if path.is_dir() and not list(path.rglob("*.parquet")):
            return datasets.load_dataset("imagefolder", data_dir=str(path), **options)
        if path.is_dir():
            return datasets.load_dataset("parquet", data_dir=str(path), **options)
        if path.suffix == ".parquet" and path.exists():
            return datasets.load_dataset("parquet", data_files=str(path), **options)
        return datasets.load_dataset(dataset, **options)
    except Exception as error:  # whatever the readers of strangers' files come upon
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        raise UserError(
            f"dataset '{dataset}', split '{split}': it cannot be opened ({reason}); give a folder of images with a "
            f"metadata.jsonl or metadata.csv, a parquet file, or a name that `load_dataset` takes"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _encoded(found: Any) -> Any:
    """The data set with its images as they are stored: a row that cannot be decoded is then ours to name."""
    import datasets

    for name, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return found


def column_names(found: Any, dataset: str) -> list[str]:
    """The data set's columns; a stream that does not declare them is asked for its first row."""
    if found.column_names:
        return list(found.column_names)
    row = next(iter(found), None)
    if row is None:
        raise UserError(f"dataset '{dataset}': it has no rows; give another one")
    return list(row)


def find_columns(there: list[str], dataset: str, image_column: str, caption_column: str | None) -> tuple[str, str]:
    """The names of the image and the caption column; UserError names the columns that there are."""
    where, listed = f"dataset '{dataset}'", ", ".join(there)
    if image_column not in there:
        raise UserError(f"{where}: it has no column '{image_column}'; it has: {listed}. Set image_column")
    if caption_column is None:
        known = [name for name in CAPTION_COLUMNS if name in there]
        if not known:
            allowed = ", ".join(CAPTION_COLUMNS)
            raise UserError(f"{where}: it has no caption column ({allowed}); it has: {listed}. Set caption_column")
        return image_column, known[0]
    if caption_column not in there:
        raise UserError(f"{where}: it has no column '{caption_column}'; it has: {listed}. Set caption_column")
    return image_column, caption_column


def read_picture(value: Any, where: str) -> Image.Image:
    """A column's value (encoded bytes, or what `datasets` keeps of an image) as an RGB picture; UserError if broken."""
    import datasets

    try:
        if isinstance(value, bytes):
            picture: Image.Image = Image.open(BytesIO(value))
        elif isinstance(value, Mapping):
            picture = datasets.Image().decode_example(dict(value))
        elif isinstance(value, Image.Image):
            picture = value
        else:
            raise ValueError(f"it holds {value!r:.60}")
        return _eight_bits(ImageOps.exif_transpose(picture)).convert("RGB")
    except Exception as error:  # whatever a decoder makes of a stranger's bytes
        raise UserError(f"{where}: its image cannot be read ({error}); mend or remove that row") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits as 8, which `convert` would clip to white; ValueError for numbers without a known range."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}, whose range is not known; save it with 8 or 16 bits")
    return picture


def read_caption(value: Any, column: str, where: str) -> str:
    """A column's value as a caption; UserError unless it is a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where}: column '{column}' holds {value!r}, but a caption is a text that is not empty; fill it in or "
            f"remove that row"
        )
    return value


def to_latents(pictures: Sequence[Image.Image | Tensor], backbone: Backbone) -> Tensor:
    """Pictures encoded by the backbone; or, where a cache gave their latents, these. Float32 [B, C, h, w]."""
    kept = [picture for picture in pictures if isinstance(picture, Tensor)]
    if kept:
        return torch.stack(kept).to(backbone.device).float()
    pixels = torch.stack([fit(picture, backbone.resolution) for picture in pictures if not isinstance(picture, Tensor)])
    return backbone.encode_images(pixels.to(backbone.device))


def fit(picture: Image.Image, resolution: int) -> Tensor:
    """The central square at `resolution` (bicubic, antialiased); float [3, R, R] in [0, 1]."""
    width, height = picture.size
    if (width, height) != (resolution, resolution):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # The square alone is enlarged: of a strip of pixels the whole would be gigabytes.
        square = (left, top, left + side, top + side)
        picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC, box=square)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
