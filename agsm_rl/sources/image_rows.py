"""Images in files with what tables or text files say of them, as a `datasets.Dataset`.

Captions come from metadata files (metadata.jsonl, .csv or .parquet: `file_name`, and any columns), or, where there are
none, from a text file beside each image. Images without a row and rows without an image are counted and named.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.sources.folder_files import Sidecars, counted, name_some
from agsm_rl.sources.local_data import METADATA
from agsm_rl.sources.pictures import SUFFIXES
from agsm_rl.sources.tables import columns_of, read_lines, read_rows

log = logging.getLogger(__name__)

FILE = "file_name"
"""The column of metadata that names the image; `chosen_file_name` names that of the column `chosen`."""
CAPTION_COLUMNS = ("caption", "text", "prompt", "txt")
"""Where captions are looked for if no column is named, in this order."""
CAPTIONS_WANTED = (
    "give each a caption: a metadata.jsonl in the folder with one line per image, as in "
    '{"file_name": "1.png", "caption": "a red star"}, or a text file beside each (1.txt beside 1.png)'
)


def read_image_folder(root: Path, files: Sequence[Path], where: str) -> Any:
    """The images among `files` with the metadata among them, or else with their captions in text files beside them.

    UserError where no image has a caption.
    """
    images = [file for file in files if file.name.lower() not in METADATA]
    metadata = [file for file in files if file.name.lower() in METADATA]
    if not metadata:
        return _with_sidecars(images, where)
    folders = [file.parent for file in metadata]
    if twice := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        names = ", ".join(file.name for file in metadata if str(file.parent) == twice[0])
        raise UserError(f"{where}: {twice[0]} has several metadata files ({names}); leave one of them there")
    rows = [row for file in metadata for row in read_image_table(file, where, inside=root)]
    named = {path for row in rows for path in row.values() if isinstance(path, Path)}
    there = set(images)
    known = {image for image in there if image in named}
    usable = [row for row in rows if all(path in there for path in row.values() if isinstance(path, Path))]
    if not usable:
        raise UserError(
            f"{where}: none of the {len(rows)} rows of its metadata names an image that is there ({name_some(named)}); "
            "`file_name` is the image's path from the metadata file's folder"
        )
    if missing := sorted(named - there):
        count = counted(len(rows) - len(usable), "row")
        log.warning("%s: left out %s of the metadata without an image: no %s", where, count, name_some(missing))
    if without := [image for image in images if image not in known]:
        count = f"{len(without)} of {counted(len(images), 'image')}"
        log.warning("%s: left out %s without a row in the metadata: %s", where, count, name_some(without))
    return to_dataset(usable, where)


def read_image_table(file: Path, where: str, *, inside: Path | None = None) -> list[dict[str, Any]]:
    """A table's rows, with the images that they name as paths.

    Those are `file_name` (which becomes the column `image`) and `NAME_file_name` (NAME); in a table without these,
    columns of nothing but image files' names, other than captions. inside: no path may lead out of this folder.
    UserError for rows that cannot be read.
    """
    rows = read_rows(file, f"{where}: {file.name}")
    names = columns_of(rows)
    columns = [name for name in names if name == FILE or name.endswith(f"_{FILE}")]
    columns = columns or [name for name in names if _holds_paths(name, rows)]
    renamed = {name: "image" if name == FILE else name.removesuffix(f"_{FILE}") for name in columns}
    made = []
    for place, row in rows:
        paths = {renamed[key]: _image(file, row.get(key), f"{where}: {file.name}, {place}", inside) for key in columns}
        made.append(paths | {key: value for key, value in row.items() if key not in renamed})
    return made


def _holds_paths(column: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    values = [row[column] for _, row in rows if row.get(column) is not None]
    endings = {Path(value).suffix.lower() if isinstance(value, str) else "" for value in values}
    return bool(endings) and endings <= SUFFIXES and column not in CAPTION_COLUMNS


def _image(table: Path, value: Any, where: str, inside: Path | None) -> Path | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: it names the image {value!r:.60}, but an image is named by its path, a text")
    name = value if "\\" not in value or (table.parent / value).exists() else value.replace("\\", "/")
    leads_out = Path(name).is_absolute() or ".." in Path(name).parts
    if "://" in name or (inside is not None and leads_out):
        raise UserError(
            f"{where}: '{value:.200}' is not in the folder; name images by their path from the metadata's folder"
        )
    return table.parent / name


def _with_sidecars(images: Sequence[Path], where: str) -> Any:
    """The images beside which a text file has captions: a caption per line."""
    beside = Sidecars(images)
    rows, without, differing = [], [], []
    for image in images:
        files = beside.of(image)
        if not files:
            without.append(image)
            continue
        texts = [read_lines(file, f"{where}: {file.name}") for file in files]
        if any(lines != texts[0] for lines in texts[1:]):
            differing.append(image)
        rows.append({"image": image, "caption": texts[0] if len(texts[0]) > 1 else "".join(texts[0])})
    if not rows:
        raise UserError(f"{where}: it has {counted(len(images), 'image')} but no captions; {CAPTIONS_WANTED}")
    of_all = counted(len(images), "image")
    if without:
        names = name_some(without)
        log.warning("%s: left out %s of %s without a text file beside: %s", where, len(without), of_all, names)
    if differing:
        log.warning(
            "%s: %s of %s have both a .txt and a .caption with different text; the .txt is used: %s",
            where, len(differing), of_all, name_some(differing),
        )  # fmt: skip
    return to_dataset(rows, where)


def to_dataset(rows: Sequence[Mapping[str, Any]], where: str) -> Any:
    """A `datasets.Dataset` of rows whose images are paths; UserError where there are none.

    Its fingerprint, under which encodings are kept, changes with each image file's size and time.
    """
    import datasets
    import pyarrow

    if not rows:
        raise UserError(f"{where}: it has no rows; give one with at least a batch of images")
    columns: dict[str, list[Any]] = {}
    features = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, Path) for value in values):
            features[name] = datasets.Image(decode=False)
            columns[name] = [
                None if value is None else {"bytes": None, "path": str(value.absolute())} for value in values
            ]
            continue
        if any(isinstance(value, list) for value in values):
            values = [value if isinstance(value, list) or value is None else [value] for value in values]
        try:
            features[name] = datasets.features.features.generate_from_arrow_type(pyarrow.array(values).type)
            columns[name] = values
        except (pyarrow.ArrowException, ValueError, TypeError) as error:
            log.warning("%s: the column '%s' is left out, its values are of different kinds (%s)", where, name, error)
    found = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    found._fingerprint = _fingerprint(columns)
    return found


def _fingerprint(columns: Mapping[str, Sequence[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(columns, sort_keys=True, default=repr).encode())
    paths = {
        value["path"] for values in columns.values() for value in values if isinstance(value, dict) and "path" in value
    }
    for path in sorted(paths):
        state = Path(path).stat() if Path(path).is_file() else None
        digest.update(f"{path} {state and (state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:32]
