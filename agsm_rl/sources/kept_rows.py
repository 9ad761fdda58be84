"""Rows of tensors kept on disk: Arrow files that `datasets` memory-maps, each written whole or not at all.

Making them continues after a kill, one file at a time, and is shared by all processes that see the folder.
"""

import logging
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.files import replacing
from agsm_rl.interfaces import Shard
from agsm_rl.training.stages import Advance, stage

log = logging.getLogger(__name__)

FILES = 128
"""The most files in a folder; a kill loses the contents of one of them."""
FEWEST_ROWS = 64
"""The fewest rows in a file, if there are as many."""
ROWS_AT_ONCE = 16
"""Rows that are made together and written as one record batch."""

Content = dict[str, Tensor] | str
"""A row: its tensors by name, or why there are none."""


class KeptRows:
    """`count` rows in `folder`, made once and then read from there. Rows are numbered from 0.

    In the files a row is its tensors in safetensors' form, the reason why there are none, and a CRC-32 of both.
    """

    def __init__(self, folder: Path, count: int, *, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self.folder, self.count, self._at_once = folder, count, rows_at_once
        self._length = max(FEWEST_ROWS, ceil(count / FILES))
        self._files = ceil(count / self._length)
        self._opened: dict[int, Any] = {}
        self._maker: Callable[[list[int]], list[Content]]

    def make(self, make: Callable[[list[int]], list[Content]], shard: Shard) -> None:
        """Make what is missing or damaged: `make` gives the contents of the rows of the given numbers.

        Each process begins at a different file and skips those that others are making; it waits for the last ones.
        UserError when they cannot be written.
        """
        self._maker = make
        with stage(f"encoding {self.folder.name}", total=self.count, unit="rows") as advance:
            self._make_all(make, shard, advance)

    def _make_all(self, make: Callable[[list[int]], list[Content]], shard: Shard, advance: Advance) -> None:
        first = self._files * shard.index // shard.count
        order = [(first + number) % self._files for number in range(self._files)]
        for wait in (False, True):
            for number in order:
                if number in self._opened:
                    continue
                if not self._open(number):
                    self._make_file(number, make, wait=wait)
                if number in self._opened:
                    advance(len(self._rows(number)))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """The row's tensors; UserError with the reason where it has none.

        A file with a row that does not match its checksum is made again; OSError if that does not help.
        """
        file, place = divmod(number, self._length)
        row = self._opened[file][place]
        if not _is_whole(row):
            log.warning("%s is damaged and will be made again", self._path(file))
            del self._opened[file]
            self._path(file).unlink(missing_ok=True)
            self._make_file(file, self._maker, wait=True)
            row = self._opened[file][place]
            if not _is_whole(row):
                raise OSError(f"{self._path(file)} is damaged again right after it was written; is the disk faulty?")
        if row["reason"] is not None:
            raise UserError(row["reason"])
        return safetensors.torch.load(row["tensors"])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:03d}-of-{self._files:03d}.arrow"

    def _rows(self, number: int) -> range:
        return range(number * self._length, min((number + 1) * self._length, self.count))

    def _open(self, number: int) -> bool:
        """Whether the file is there and whole; it is then mapped."""
        import datasets

        path = self._path(number)
        if not path.exists():
            return False
        try:
            found = datasets.Dataset.from_file(str(path))
            whole = len(found) == len(self._rows(number)) and found.features == _features()
        except (OSError, ValueError, TypeError, KeyError, NotImplementedError):  # pyarrow's are kinds of these
            whole = False
        if whole:
            self._opened[number] = found
        return whole

    def _make_file(self, number: int, make: Callable[[list[int]], list[Content]], *, wait: bool) -> None:
        path = self._path(number)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), blocking=wait):
                if not self._open(number):  # another process may have made it meanwhile
                    if path.exists():
                        log.warning("%s is damaged and will be made again", path)
                    self._write(number, make)
                    self._open(number)
        except Timeout:
            return
        except OSError as error:
            raise UserError(
                f"{path}: it cannot be written ({error.strerror or error}); what was made before is kept. Free some "
                f"space, or set AGSM_RL_CACHE to another folder"
            ) from error

    def _write(self, number: int, make: Callable[[list[int]], list[Content]]) -> None:
        """Write a shard, which gets its name when it is whole and on the disk."""
        from datasets.arrow_writer import ArrowWriter

        path = self._path(number)
        with (
            replacing(path, aside=path.with_suffix(".partial")) as aside,
            ArrowWriter(path=str(aside), features=_features()) as writer,
        ):
            for columns in self._columns(number, make):
                writer.write_batch(columns)
            writer.finalize()

    def _columns(self, number: int, make: Callable[[list[int]], list[Content]]) -> Iterator[dict[str, list[Any]]]:
        rows = self._rows(number)
        for begin in range(0, len(rows), self._at_once):
            contents = make(list(rows[begin : begin + self._at_once]))
            tensors = [safetensors.torch.save({} if isinstance(one, str) else one) for one in contents]
            reasons = [one if isinstance(one, str) else None for one in contents]
            if begin == 0:
                self._look_for_room(sum(map(len, tensors)) / len(tensors))
            checksums = [_checksum(*row) for row in zip(tensors, reasons, strict=True)]
            yield {"tensors": tensors, "reason": reasons, "checksum": checksums}

    def _look_for_room(self, row: float) -> None:
        """Report how much will be written, if nothing is yet; UserError beforehand if it does not fit."""
        there = [number for number in range(self._files) if self._path(number).exists()]
        needed = row * (self.count - sum(len(self._rows(number)) for number in there))
        if not there and self.count > 1:
            size = f"{row * self.count / 1e9:.3g} GB, {row / 1e3:.3g} kB per row"
            print(f"agsm-rl: filling {self.folder}, once: {self.count} rows, {size}", file=sys.stderr)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: about {needed / 1e9:.3g} GB are still to be written, {free / 1e9:.3g} GB are free; "
                "free some space, set AGSM_RL_CACHE to another folder, or keep less (`cache: latents`)"
            )


def _features() -> Any:
    from datasets import Features, Value

    return Features({"tensors": Value("binary"), "reason": Value("string"), "checksum": Value("uint32")})


def _is_whole(row: dict[str, Any]) -> bool:
    return bool(row["checksum"] == _checksum(row["tensors"], row["reason"]))


def _checksum(tensors: bytes, reason: str | None) -> int:
    return zlib.crc32((reason or "").encode(), zlib.crc32(tensors))
