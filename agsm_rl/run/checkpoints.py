"""Checkpoints: written aside, checksummed, renamed; the newest good one is found and damaged ones are named."""

import hashlib
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from agsm_rl.errors import UserError
from agsm_rl.files import replacing

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})\.pt")


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2, best: int | None = None) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`; the `keep` newest and that of `best` stay.

    The checksum is written before the checkpoint gets its name, so that a kill at any instant leaves a good one behind;
    where a checkpoint of that step exists already, both checksums hold until the new one stands in its place.
    UserError when it cannot be written (the disk is full, say), naming the newest good one, which is left as it was.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, aside=path.with_suffix(".partial")) as aside:
            torch.save(state, aside)
            digests = [_digest(aside)]
            _write_checksums(path, digests + ([_digest(path)] if path.exists() else []))
        _write_checksums(path, digests)
    except (OSError, RuntimeError) as error:
        raise _unwritten(folder, path, error) from error
    # Newer ones are damaged, passed over when the run was resumed before them: they must not push out the good.
    kept = [old for old in _all(folder) if _step_of(old) <= step]
    for old in [old for old in kept[keep:] if _step_of(old) != best]:
        old.unlink()
        _checksum_path(old).unlink(missing_ok=True)
    return path


def newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole, as (step, state); None if there was never one.

    Damaged ones are named in a warning and passed over; UserError if no good one is left.
    """
    damaged = []
    for path in _all(folder):
        if is_whole(path):
            return _step_of(path), _load(path)
        damaged.append(path.name)
        log.warning("%s is damaged (it does not match its checksum); trying the one before it", path)
    if damaged:
        raise UserError(
            f"{folder}: no good checkpoint is left ({', '.join(damaged)} damaged); start again in a new run folder"
        )
    return None


def of_step(folder: Path, step: int) -> dict[str, Any] | None:
    """The checkpoint of a step; None when it is not there or damaged."""
    path = folder / f"step-{step:08d}.pt"
    return _load(path) if is_whole(path) else None


def steps_in(folder: Path) -> list[int]:
    """The steps of the folder's checkpoints, the newest first, damaged ones included."""
    return [_step_of(path) for path in _all(folder)]


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def verdicts(folder: Path) -> dict[str, bool]:
    """Each checkpoint's name, newest first, and whether it is whole."""
    return {path.name: is_whole(path) for path in _all(folder)}


def is_whole(path: Path) -> bool:
    """Whether a checkpoint matches its checksum."""
    checksum = _checksum_path(path)
    try:
        return _digest(path) in checksum.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return False


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: it is no checkpoint of this program ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: it is no checkpoint of this program (it holds a {type(state).__name__})")
    return state


def _unwritten(folder: Path, path: Path, error: Exception) -> UserError:
    """torch wraps the cause, such as `No space left on device`, in errors of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
    good = [name for name, whole in verdicts(folder).items() if whole] if folder.is_dir() else []
    left = f"the newest good checkpoint is {folder / good[0]}" if good else "there is no earlier checkpoint"
    return UserError(
        f"{path}: it cannot be written ({reason}); {left}. Make room (or mend the folder), then go on with --resume"
    )


def _all(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), reverse=True)


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _write_checksums(path: Path, digests: list[str]) -> None:
    """Write those that the checkpoint may have; safely too, because a torn checksum condemns a good checkpoint."""
    with replacing(_checksum_path(path), aside=path.with_suffix(".checksum.partial")) as aside:
        aside.write_text("".join(digest + "\n" for digest in digests), encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
