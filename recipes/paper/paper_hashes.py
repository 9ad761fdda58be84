"""SHA-256 of what a figure depends on and nobody can look up: the data that were read, the weights that were trained.

A file is hashed as `sha256sum` does it. A folder's hash is of the sorted list of its files, a line each: the name, and
the file's hash; for a photograph its size in bytes; for a PNG, which is cropped here and whose bytes depend on Pillow,
nothing more. A data set's captions lie in a file and so count to the letter. Hidden files do not count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from paper_plan import Part, Place

PHOTOGRAPHS, CROPPED = (".jpg", ".jpeg", ".webp"), ".png"


def digest(path: Path) -> str:
    """The SHA-256 of a file or a folder."""
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        rows = (f"{name} {_content(path / name)}\n" for name in names)
        return hashlib.sha256("".join(rows).encode()).hexdigest()
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _content(file: Path) -> str:
    kind = file.suffix.lower()
    return "" if kind == CROPPED else str(os.stat(file).st_size) if kind in PHOTOGRAPHS else digest(file)


def hashes_of(part: Part, place: Place, known: dict[Path, str]) -> dict[str, str]:
    """By name, of what is there: the data of a command (`data/…`) and its weights (`sd15/agsm/seed0/run/adapter/…`).

    `known` keeps the data's, which take seconds for COCO, while a script runs.
    """
    found = {}
    for name in part.data:
        path = place.data / name
        if path not in known and path.exists():
            known[path] = digest(path)
        if path in known:
            found[f"data/{name}"] = known[path]
    for file in _files_of(part.weights):
        found[file.relative_to(place.out).as_posix()] = digest(file)
    return found


def _files_of(weights: Path | None) -> list[Path]:
    if weights is None:
        return []
    return sorted(weights.glob("[!.]*.safetensors")) if weights.is_dir() else [weights] * weights.is_file()


def missing(part: Part, place: Place, hashes: Mapping[str, str]) -> Iterator[str]:
    """What a command's hashes lack."""
    yield from (name for name in part.data if f"data/{name}" not in hashes)
    if part.weights is not None:
        weights = part.weights.relative_to(place.out).as_posix()
        if not any(name == weights or name.startswith(f"{weights}/") for name in hashes):
            yield weights


def disagreements(hashes: Iterable[tuple[str, Mapping[str, str]]]) -> Iterator[str]:
    """A sentence for each file or folder of which two commands, given by name, have different hashes."""
    first: dict[str, tuple[str, str]] = {}
    told: set[str] = set()
    for command, by_name in hashes:
        for name, sha256 in by_name.items():
            earlier, known = first.setdefault(name, (command, sha256))
            if sha256 != known and name not in told:
                told.add(name)
                yield f"{name}: {command} has another ({sha256:.12}…) than {earlier} ({known:.12}…)"
