"""Archives of images: a zip or tar file with its metadata is unpacked once, beside the encodings that are kept.

Tar files without metadata are webdataset's shards, which `datasets` reads as they are.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from itertools import islice
from pathlib import Path, PurePosixPath

from filelock import FileLock

from agsm_rl.errors import UserError
from agsm_rl.sources.local_data import METADATA

LOOKED_AT = 1000
"""Members of a tar file among which metadata is looked for: listing all of a shard means reading it."""


def is_webdataset(archive: Path, where: str) -> bool:
    """Whether it is a tar file whose members belong together by their names, without a table about them."""
    if zipfile.is_zipfile(archive):
        return False
    try:
        with tarfile.open(archive) as tar:
            return not any(PurePosixPath(member.name).name.lower() in METADATA for member in islice(tar, LOOKED_AT))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{where}: {archive.name} cannot be read as an archive ({error})") from error


def unpacked(archive: Path, where: str, cache: Path) -> Path:
    """The folder in `cache` to which the archive was unpacked, which is done once for each state of the file.

    UserError where it cannot be read, leads out of its folder, or does not fit on the disk.
    """
    state = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:32]
    folder = cache / f"unpacked-{key}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                _unpack(archive, partial, where)
                partial.replace(folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{where}: {archive.name} cannot be unpacked ({error})") from error
    except OSError as error:
        raise UserError(
            f"{where}: {archive.name} cannot be unpacked to {folder} ({error.strerror or error}); make room, or set "
            "AGSM_RL_CACHE to another folder"
        ) from error
    return folder


def _unpack(archive: Path, folder: Path, where: str) -> None:
    folder.mkdir()
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            _check_room(sum(item.file_size for item in packed.infolist()), folder, archive, where)
            packed.extractall(folder)  # it keeps members inside the folder
    else:
        with tarfile.open(archive) as tar:
            _check_room(sum(member.size for member in tar), folder, archive, where)
            tar.extractall(folder, filter="data")


def _check_room(needed: int, folder: Path, archive: Path, where: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{where}: {archive.name} unpacks to {needed / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free in "
            f"{folder.parent}; free some space, or set AGSM_RL_CACHE to another folder"
        )
