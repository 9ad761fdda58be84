"""The files of a folder of data, through links, and the text files beside its images.

People link images into their data folders, and the hub's cache is made of links: they are followed to regular files and
folders, wherever those are. Named pipes, devices and links to nothing are left out, a folder that links lead to twice
is read once, and each of these is reported.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from agsm_rl.errors import UserError

log = logging.getLogger(__name__)

SIDECARS = (".txt", ".caption")
"""Endings of the files with one image's captions, as kohya's and others' trainers read them, in order of preference."""
NAMED = 5
"""Files that a message names one by one."""
MAX_FILES = 5_000_000
"""Files of a folder; more are looked at for minutes, and are better kept in archives or tables."""
PSEUDO = ("proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "bpf")
"""File systems whose files are made up by the kernel, without end where links lead back."""


def list_files(root: Path, where: str) -> list[Path]:
    """All regular files below a folder, sorted, through links; hidden ones and what macOS adds to archives left out."""
    made_up = _made_up()
    if os.path.realpath(root) == "/" or _is_below(os.path.realpath(root), made_up):
        raise UserError(f"{where}: this is a part of the system, not a folder of data; give the folder of the data")
    files: list[Path] = []
    repeated: list[Path] = []
    odd: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or real in made_up:
            repeated.append(Path(place))
            folders[:] = []
            continue
        seen.add(real)
        shown = [name for name in folders if not name.startswith((".", "__MACOSX", "__pycache__"))]
        # A folder itself before a link to it: which of the two is read does not depend on the disk's order.
        folders[:] = sorted(shown, key=lambda name: (Path(place, name).is_symlink(), name))
        for name in names:
            if not name.startswith("."):
                (files if _is_regular(Path(place, name)) else odd).append(Path(place, name))
        if len(files) + len(odd) > MAX_FILES:
            raise UserError(
                f"{where}: it has more than {MAX_FILES:,} files; give a folder with fewer, or put them into "
                "parquet files or tar archives"
            )
    _report(root, sorted(files), odd, repeated, where)
    return sorted(files)


def _made_up() -> set[str]:
    """Where the kernel's file systems are mounted."""
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    mounts = (line.split() for line in lines)
    return {mount[1] for mount in mounts if len(mount) > 2 and mount[2] in PSEUDO}


def _is_below(path: str, places: Iterable[str]) -> bool:
    return any(path == place or path.startswith(place + os.sep) for place in places)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link to nothing, or to itself
        return False


def _report(root: Path, files: list[Path], odd: list[Path], repeated: list[Path], where: str) -> None:
    """One line for each kind of file that is not simply a file of this folder."""
    inside = os.path.join(os.path.realpath(root), "")
    outside = [file for file in files if not os.path.realpath(file).startswith(inside)]
    if outside:
        what = counted(len(outside), "file")
        log.warning("%s: %s of it are read through links to other folders: %s", where, what, name_some(outside))
    if odd:
        what = f"{counted(len(odd), 'entry', 'entries')} that are not files (named pipes, devices, links to nothing)"
        log.warning("%s: left out %s: %s", where, what, name_some(odd))
    if repeated:
        what = counted(len(repeated), "link")
        log.warning("%s: left out %s to folders that are read already: %s", where, what, name_some(repeated))


class Sidecars:
    """The text files beside images: NAME.txt, then NAME.caption, of NAME.png."""

    def __init__(self, images: Iterable[Path]) -> None:
        self._files: dict[Path, list[Path]] = {}
        for folder in sorted({image.parent for image in images}):
            for file in sorted(folder.iterdir(), key=lambda file: (file.suffix.lower() == SIDECARS[1], file.name)):
                if file.suffix.lower() in SIDECARS and _is_regular(file):
                    self._files.setdefault(file.with_suffix(""), []).append(file)

    def of(self, image: Path) -> list[Path]:
        """Those of an image, the one that is used first."""
        return self._files.get(image.with_suffix(""), [])


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """1 image, 2 images."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def name_some(things: Iterable[object]) -> str:
    """The first few, and how many more."""
    names = [thing.name if isinstance(thing, Path) else str(thing) for thing in things]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
