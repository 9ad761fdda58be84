"""Paths and files: what a name refers to, files that are never seen half written, and files that are read with care.

Every path that a user gives goes through `local_path`, and every name that may also be the Hugging Face hub's goes
through `local_or_hub`, so that the same rules hold everywhere. `read_text` and `read_json` take regular files only (a
named pipe would hang, a device never end), within bounds of size and depth; what is wrong is a UserError with the name.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name, the only form in which the hub is asked."""
FILE_SUFFIXES = frozenset(
    [".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"]
    + [".yaml", ".yml", ".zip", ".tar", ".gz", ".png", ".jpg"]
)
"""A name that ends in one of these is a file's, never a hub's."""
HUB_SECONDS = 5.0
"""How long the hub may take to answer at all; its clients retry for half a minute."""
MAX_BYTES = 2**28
"""The largest text file that is read at once: 256 MiB."""
MAX_DEPTH = 100
"""Lists and mappings within each other; our own files need ten."""


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path of that name; `~` at its beginning is the home folder. UserError where that user has none."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError as error:
        if path.exists():
            return path
        raise UserError(f"{name}: the home folder of {path.parts[0]} is not known; write the path out") from error


def local_or_hub(name: str, *, where: str, allowed: str) -> Path | None:
    """The file or folder of that name; None where there is none and only the hub's `owner/name` can be meant.

    A file or folder comes before a hub's repository. UserError, without asking the hub, for anything else: `where` is
    the key or option, `allowed` says what may be given.
    """
    path = local_path(name)
    with suppress(OSError):  # a name that is too long for the file system
        if path.exists():
            check_not_special(path)
            return path
    first = path.parts[0] if path.parts else ""
    if HUB_NAME.fullmatch(name) and path.suffix.lower() not in FILE_SUFFIXES and not Path(first).exists():
        return None
    place = f" in {Path.cwd()}" if not path.is_absolute() else "" if str(path) == name else f" ({path})"
    raise UserError(f"{where} '{name}': there is no such file or folder{place}; give {allowed}")


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached; asked once, for HUB_SECONDS at most."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # whatever the installed HTTP client raises where nobody answers
        return False
    return True


def hub_is_forbidden() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode() and not _unreachable


_unreachable: list[str] = []
"""Names that are being read from the cache alone, because the hub cannot be reached."""


@contextmanager
def cache_where_unreachable(*names: str | None) -> Iterator[None]:
    """Within the block, the hub's libraries read only their caches if the hub cannot be reached: they would retry.

    The hub is asked for nothing where all `names` are builtins or on this machine.
    """
    from huggingface_hub import constants

    remote = [name for name in names if name and not name.startswith("builtin:") and not local_path(name).exists()]
    if not remote or constants.HF_HUB_OFFLINE or hub_answers():
        yield
        return
    # `datasets` keeps its own copy of the setting.
    places: list[Any] = [constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    _unreachable.extend(remote)
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        del _unreachable[-len(remote) :]
        for place in places:
            place.HF_HUB_OFFLINE = False


def why_not_on_hub(name: str) -> str:
    """For messages: why a name that could be the hub's was not found there."""
    if hub_is_forbidden():
        return f"'{name}' is not here and not in the hub's cache, and the hub may not be asked: HF_HUB_OFFLINE is set"
    if not hub_answers():
        return f"'{name}' is not here and not in the hub's cache, and the hub cannot be reached"
    return f"'{name}' is not here, and the hub did not give it"


@contextmanager
def replacing(path: Path, *, aside: Path | None = None) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end of the block the file takes the place of `path`.

    If the block fails, or the process is killed, `path` stays as it was. The file can be read by whom the umask lets,
    also where a library makes it for its owner alone (safetensors does). `aside` overrides the name of the file that
    is written first, for callers that clean up after a kill by name. OSError when the disk refuses.
    """
    aside = aside or path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with suppress(FileNotFoundError):  # somebody's link in its place would be written through
            aside.unlink()
        with aside.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield aside
        aside.chmod(mode)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(aside), aside):
            # A full disk is reported by `write`, which knows no name.
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file: a kill leaves the old file or the new one."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def check_regular(path: Path) -> None:
    """UserError unless the path is a file that can be read to its end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise UserError(f"{path}: {_reason(error)}.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file (a named pipe, a device or a socket)"
        raise UserError(f"{path}: this is {kind}; give a file.")


def check_not_special(path: Path) -> None:
    """UserError for a named pipe, a device or a socket: reading it might hang, or never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: this is a named pipe, a device or a socket; give a file or a folder.")


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark; UserError if there is none."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise UserError(f"{path}: it has more than {max_bytes:,} bytes, the most that is read.")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text in UTF-8 ({error}).") from error


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The content of a JSON file, which may hold NaN and infinities; UserError if it is not one."""
    return parse_json(read_text(path, max_bytes=max_bytes), where=str(path))


def parse_json(text: str, *, where: str) -> Any:
    """The content of a JSON text; UserError if it is none, or nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply (more than {MAX_DEPTH} levels).") from error
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}).") from error
    level, depth = [content], 0
    while level := [child for part in level for child in _children(part)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: is nested too deeply (more than {MAX_DEPTH} levels).")
    return content


def check_contained(folder: Path, names: Iterable[str]) -> None:
    """UserError unless all under these names in a folder is in it: no links that lead out, no pipes, no devices."""
    root = folder.resolve()
    for name in names:
        _check_contained(folder / name, root)


def check_kinds(folder: Path, kinds: Mapping[str, str]) -> None:
    """UserError where something in the folder is not what its name says: `a file` or `a folder`, by name."""
    for name, kind in kinds.items():
        path = folder / name
        if os.path.lexists(path) and not (path.is_dir() if kind == "a folder" else path.is_file()):
            got = "a folder" if path.is_dir() else "a link to nothing" if not path.exists() else "not one"
            raise UserError(f"{path}: this must be {kind}, but it is {got}. Move it away.")


def _check_contained(path: Path, root: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(root):
            raise UserError(
                f"{path}: is a link out of its folder, to {target}; nothing is read, written or deleted through it. "
                "Put the file itself there, or remove the link."
            )
    elif stat.S_ISDIR(mode):
        for entry in os.scandir(path):
            _check_contained(Path(entry.path), root)
    elif not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a regular file (a named pipe, a device or a socket); remove it.")


def _children(part: Any) -> Any:
    return part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _flush_folder(folder: Path) -> None:
    """Have the rename itself on the disk; some file systems cannot, and the file is complete all the same."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
