"""Encoded texts by what they depend on: the newest in memory, and, given a folder, all of them on the disk.

A text has a file of its own, named by a digest of the encoders, the settings and the text, so that processes and runs
share what any of them encoded, and a kill loses nothing but the file that is being written.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.files import replacing, write_text

logger = logging.getLogger(__name__)
FORMAT = 1
"""Part of the folder's name: raise it when the same text is encoded or kept otherwise."""
AT_ONCE = 16
"""Texts that are encoded together, where the encoders pad all of them to one length."""
LENGTHS = ("", "a b c")
"""Texts that show whether results are as long as their texts."""
WORTH_SAYING = 1e8
"""Bytes on the disk from which on they are reported."""
IN_MEMORY = 512 * 2**20
"""Bytes of encoded texts that are held in memory at most."""

Entry = tuple[tuple[str, Tensor | None], ...]
"""What `encode_prompt` returns for one text: the form of each of its results, and its tensor where it has one."""


class TextStore:
    """Entries by key; `folder` None: the newest ones only, in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0
        self.written = 0
        """Bytes of the encoded texts that were put in."""

    def key(self, of: Mapping[str, Any]) -> str:
        """The digest under which the encoding of a text with these settings is kept."""
        return hashlib.sha256(json.dumps(dict(of), sort_keys=True).encode()).hexdigest()[:40]

    def __contains__(self, key: str) -> bool:
        return key in self._held or (self.folder is not None and self._path(key).exists())

    def get(self, key: str) -> Entry | None:
        """The entry; None if there is none, or its file is damaged."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        if self.folder is None or not self._path(key).exists():
            return None
        entry = self._read(self._path(key))
        if entry is not None:
            self._hold(key, entry)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry; its tensors are on the CPU. UserError when it cannot be written."""
        self._hold(key, entry)
        self.written += _size(entry)
        if self.folder is None:
            return
        path = self._path(key)
        tensors = {str(number): part.contiguous() for number, (_, part) in enumerate(entry) if part is not None}
        forms = json.dumps([form for form, _ in entry])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as aside:
                safetensors.torch.save_file(tensors, aside, metadata={"forms": forms})
        except (OSError, SafetensorError) as error:
            raise _unwritable(path, error) from error

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write a note into the folder that says what it belongs to; UserError when it cannot be written."""
        if self.folder is None or (self.folder / "about.json").exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "about.json", json.dumps(dict(about), indent=1) + "\n")
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def look_for_room(self, count: int, size: float) -> None:
        """Report how much `count` more texts of `size` bytes will take; UserError if it does not fit."""
        if self.folder is None or not count:
            return
        if size * count > WORTH_SAYING:
            print(f"agsm-rl: filling {self.folder}, once: {count} texts, {size * count / 1e9:.3g} GB", file=sys.stderr)
        free = shutil.disk_usage(self.folder).free
        if size * count > free:
            raise UserError(
                f"{self.folder}: about {size * count / 1e9:.3g} GB of encoded texts are still to be written, "
                f"{free / 1e9:.3g} GB are free; free some space, set AGSM_RL_CACHE to another folder, or write "
                "`text: {keep: offload}`"
            )

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    def _read(self, path: Path) -> Entry | None:
        try:
            with safe_open(path, framework="pt") as file:
                forms = json.loads(file.metadata()["forms"])
                names = {*file.keys()}
                tensors = [file.get_tensor(str(n)) if str(n) in names else None for n in range(len(forms))]
                return tuple(zip(forms, tensors, strict=True))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            logger.warning("%s is damaged and will be made again", path)
            return None

    def _hold(self, key: str, entry: Entry) -> None:
        if key not in self._held:
            self._bytes += _size(entry)
        self._held[key] = entry
        while self._bytes > IN_MEMORY and len(self._held) > 1:
            self._bytes -= _size(self._held.popitem(last=False)[1])


def _size(entry: Entry) -> int:
    return sum(part.numel() * part.element_size() for _, part in entry if part is not None)


def _unwritable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(
        f"{path}: it cannot be written ({reason}); free some space, or set AGSM_RL_CACHE to another folder"
    )
