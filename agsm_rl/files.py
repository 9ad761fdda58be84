"""Files that are never seen half written: written aside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, aside: Path | None = None) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end of the block the file takes the place of `path`.

    If the block fails, or the process is killed, `path` stays as it was. `aside` overrides the name of the file that
    is written first, for callers that clean up after a kill by name. OSError when the disk refuses.
    """
    aside = aside or path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        _flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file: a kill leaves the old file or the new one."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _flush_folder(folder: Path) -> None:
    """Have the rename itself on the disk; some file systems cannot, and the file is whole all the same."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
