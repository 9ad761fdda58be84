"""Open image data sets by name and bring their images to the backbone's size: everything through `datasets`."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError

if TYPE_CHECKING:
    import datasets

CAPTION_COLUMNS = ("caption", "text", "prompt")
BUILTIN_PAIRS = "builtin:shapes"


def open_pairs(dataset: str, *, split: str, num_images: int | None) -> "datasets.Dataset":
    """The data set named by a builtin, a folder of images with metadata, a parquet file, or a name `datasets` knows.

    UserError when there is no such thing or it is empty. Data sets that need a loading script are not loaded.
    """
    import datasets

    if dataset.startswith("builtin:"):
        return _open_builtin(dataset, split, num_images)
    where = f"dataset '{dataset}'"
    path = Path(dataset)
    try:
        if path.is_dir() and not list(path.rglob("*.parquet")):
            found = datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
        elif path.is_dir():
            found = datasets.load_dataset("parquet", data_dir=str(path), split=split)
        elif path.suffix == ".parquet" and path.exists():
            found = datasets.load_dataset("parquet", data_files=str(path), split=split)
        else:
            found = datasets.load_dataset(dataset, split=split)
    except (
        FileNotFoundError,
        ValueError,
        OSError,
        ConnectionError,
        datasets.exceptions.DatasetGenerationError,
    ) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"{where}, split '{split}': it cannot be opened ({reason}); give a folder of images with a metadata.jsonl "
            f"or metadata.csv (columns file_name and caption), a parquet file, or a name that `load_dataset` takes"
        ) from error
    if num_images is not None:
        found = found.select(range(min(num_images, len(found))))
    if not len(found):
        raise UserError(f"{where}, split '{split}': it has no rows; give one with at least a batch of images")
    return found


def _open_builtin(dataset: str, split: str, num_images: int | None) -> "datasets.Dataset":
    from agsm_rl.shapes import data

    if dataset != BUILTIN_PAIRS:
        raise UserError(f"dataset '{dataset}': the only builtin pairs are '{BUILTIN_PAIRS}'")
    return data.pairs(split, num_images or 4000, seed=0)


def find_columns(
    found: "datasets.Dataset", dataset: str, image_column: str, caption_column: str | None
) -> tuple[str, str]:
    """The names of the image and the caption column; UserError names the columns that there are."""
    where, there = f"dataset '{dataset}'", ", ".join(found.column_names)
    if image_column not in found.column_names:
        raise UserError(f"{where}: it has no column '{image_column}'; it has: {there}. Set image_column")
    if caption_column is None:
        known = [name for name in CAPTION_COLUMNS if name in found.column_names]
        if not known:
            allowed = ", ".join(CAPTION_COLUMNS)
            raise UserError(f"{where}: it has no caption column ({allowed}); it has: {there}. Set caption_column")
        return image_column, known[0]
    if caption_column not in found.column_names:
        raise UserError(f"{where}: it has no column '{caption_column}'; it has: {there}. Set caption_column")
    return image_column, caption_column


def read_row(
    found: "datasets.Dataset", index: int, image_column: str, caption_column: str, dataset: str
) -> tuple[Image.Image, str]:
    """Row `index` as an RGB picture and its caption; UserError with the row's number when either is broken."""
    try:
        row = found[index]
        picture = row[image_column].convert("RGB")
    except (OSError, ValueError, AttributeError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(
            f"dataset '{dataset}', row {index}: its image cannot be read ({error}); mend or remove that row"
        ) from error
    caption = row[caption_column]
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(
            f"dataset '{dataset}', row {index}: column '{caption_column}' holds {caption!r}, but a caption is a text "
            f"that is not empty; fill it in or remove that row"
        )
    return picture, caption


def fit(picture: Image.Image, resolution: int) -> Tensor:
    """Resize the shorter side to `resolution` (bicubic, antialiased), crop the centre; float [3, R, R] in [0, 1]."""
    width, height = picture.size
    if (width, height) != (resolution, resolution):
        scale = resolution / min(width, height)
        size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
        picture = picture.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
