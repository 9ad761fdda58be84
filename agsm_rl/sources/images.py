"""Open data sets of images by name: a builtin, a local folder, file or archive, or a name on the hub."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.files import cache_where_unreachable, local_or_hub, why_not_on_hub
from agsm_rl.sources.archives import is_webdataset, unpacked
from agsm_rl.sources.cache_folder import cache_folder
from agsm_rl.sources.image_rows import CAPTION_COLUMNS, read_image_folder, read_image_table, to_dataset
from agsm_rl.sources.local_data import Listing, list_data
from agsm_rl.sources.pictures import SUFFIXES

BUILTIN_ROWS = 4000
ALLOWED = (
    "a folder of images with captions (metadata.jsonl, metadata.csv, or a NAME.txt beside each image), a parquet file, "
    "a table or archive of images, or a name on the hub (owner/name)"
)

Builtins = Mapping[str, Callable[[str, int], Any]]
"""A builtin's name → what draws its rows of a split."""


def open_dataset(
    dataset: str,
    *,
    split: str | None,
    num_rows: int | None,
    streaming: bool,
    builtins: Builtins,
    config: str | None = None,
    where: str | None = None,
) -> Any:
    """The data set of that name: a builtin, what is here on the disk, or what the hub has.

    A `datasets.Dataset`, or its `IterableDataset` with `streaming`; images are left encoded (`read_picture` decodes
    them). `split` None is its first one; `config` is one of several configurations. `where` names it in messages.
    UserError when there is no such thing or it is empty. Data sets that need a loading script are not loaded.
    """
    where = where or f"dataset '{dataset}'"
    if dataset.startswith("builtin:"):
        if dataset not in builtins:
            raise unknown_name("dataset", dataset, "a builtin data set of this source", builtins)
        found = builtins[dataset](split or "train", num_rows or BUILTIN_ROWS)
        found = found.to_iterable_dataset() if streaming else found
    elif path := local_or_hub(dataset, where="dataset", allowed=f"{ALLOWED}, or {' or '.join(builtins)}"):
        found = open_local(path, split=split, config=config, streaming=streaming, where=where)
    else:
        found = _from_hub(dataset, config, split, streaming, where)
    if num_rows is not None:
        found = found.take(num_rows) if streaming else found.select(range(min(num_rows, len(found))))
    if not streaming and not len(found):
        raise UserError(f"{where}, split '{split}': it has no rows; give one with at least a batch of images")
    return _encoded(found)


def open_local(path: Path, *, split: str | None, config: str | None, streaming: bool, where: str) -> Any:
    """The data set in a file or folder; UserError where it cannot be opened."""
    listing = list_data(path, config=config, where=where)
    name, files = listing.files(split, where)
    with _quiet(f"{where}, split '{name}'"):
        found = _of_files(listing, name, files, path, streaming=streaming, where=where)
    return found.to_iterable_dataset() if streaming and not _is_stream(found) else found


def _of_files(listing: Listing, split: str, files: Sequence[Path], root: Path, *, streaming: bool, where: str) -> Any:
    import datasets

    if listing.kind == "saved":
        return datasets.load_from_disk(str(files[0]))
    if listing.kind == "images":
        return read_image_folder(root, files, where)
    if listing.kind == "tables":
        return to_dataset([row for file in files for row in read_image_table(file, where)], where)
    if listing.kind == "arrow":
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    if listing.kind == "archives":
        shards = [is_webdataset(file, where) for file in files]
        if not any(shards):
            parts = [
                open_local(unpacked(file, where, cache_folder()), split=None, config=None, streaming=False, where=where)
                for file in files
            ]
            return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        if not all(shards):
            raise UserError(f"{where}: only some of its archives are webdataset's shards; give them one by one")
    builder = "webdataset" if listing.kind == "archives" else "parquet"
    # Names are patterns to `datasets`: brackets in them are ours to escape.
    data_files = {split: [glob.escape(str(file.absolute())) for file in files]}
    found = datasets.load_dataset(builder, data_files=data_files, split=split, streaming=streaming)
    return _with_image_column(found) if builder == "webdataset" else found


def _with_image_column(found: Any) -> Any:
    """A webdataset names its columns by the files' endings: that of the images becomes `image`."""
    names = [name for name in found.column_names or [] if f".{name.lower()}" in SUFFIXES]
    return found.rename_column(names[0], "image") if len(names) == 1 and "image" not in found.column_names else found


def _from_hub(dataset: str, config: str | None, split: str | None, streaming: bool, where: str) -> Any:
    import datasets

    with _quiet(where, dataset), cache_where_unreachable(dataset):
        found = datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    return found if split is not None else next(iter(found.values()))


@contextmanager
def _quiet(where: str, dataset: str | None = None) -> Iterator[None]:
    """Within the block, what the readers of strangers' files come upon is a UserError, without their own messages."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its tracebacks; what they say is in our message
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        if "Config name is missing" in reason:
            raise UserError(f"{where}: it has several configurations; say which one by `config:` ({reason})") from error
        if dataset is not None and isinstance(error, ConnectionError | FileNotFoundError):
            reason = why_not_on_hub(dataset)
        raise UserError(f"{where}: it cannot be opened ({reason}); give {ALLOWED}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _is_stream(found: Any) -> bool:
    import datasets

    return isinstance(found, datasets.IterableDataset)


def _encoded(found: Any) -> Any:
    """The data set with its images as they are stored: a row that cannot be decoded is then ours to name."""
    import datasets

    for name, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode:
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


def find_columns(columns: list[str], dataset: str, image_column: str, caption_column: str | None) -> tuple[str, str]:
    """The names of the image and the caption column; UserError lists the data set's columns."""
    where, listed = f"dataset '{dataset}'", ", ".join(columns)
    if image_column not in columns:
        raise UserError(f"{where}: it has no column '{image_column}'; it has: {listed}. Set image_column")
    if caption_column is None:
        known = [name for name in CAPTION_COLUMNS if name in columns]
        if not known:
            allowed = ", ".join(CAPTION_COLUMNS)
            raise UserError(f"{where}: it has no caption column ({allowed}); it has: {listed}. Set caption_column")
        return image_column, known[0]
    if caption_column not in columns:
        raise UserError(f"{where}: it has no column '{caption_column}'; it has: {listed}. Set caption_column")
    return image_column, caption_column


def read_captions(value: Any, column: str, where: str) -> list[str]:
    """A column's value as one or several captions of an image; UserError unless they are texts that are not empty."""
    captions = value if isinstance(value, list) and value else [value]
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(
                f"{where}: column '{column}' holds {value!r:.200}, but a caption is a text that is not empty; fill it "
                "in or remove that row"
            )
    return captions
