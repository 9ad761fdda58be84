"""Checkpoints: written aside, checksummed, renamed; the newest good one is found and damaged ones are named.

torch is imported where it is used, because reports look at run folders too, and are quick without it.
"""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.files import read_text, replacing

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})\.pt")
ASIDE = re.compile(r"step-\d{8}(\.checksum)?\.partial")
"""Names of the files that are written first, which a kill may leave."""


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2, best: int | None = None) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`; the `keep` newest and that of `best` stay.

    The checksum is written before the checkpoint gets its name, so that a kill at any instant leaves a good checkpoint.
    If one of that step exists already, both checksums hold until the new one has taken its place. UserError when it
    cannot be written (the disk is full, say), naming the newest good checkpoint, which is left as it was.
    """
    import torch

    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, aside=path.with_suffix(".partial")) as aside:
            with aside.open("wb") as file:  # given a path, torch would hide why the disk refused
                torch.save(state, file)
            digests = [_digest(aside)]
            _write_checksums(path, digests + ([_digest(path)] if path.exists() else []))
        _write_checksums(path, digests)
    except (OSError, RuntimeError) as error:
        raise unwritten(path, folder, error) from error
    # Newer ones are damaged: the run was resumed before them, and they must not push out the good ones.
    previous = [old for old in _all(folder) if _step_of(old) <= step]
    for old in [old for old in previous[keep:] if _step_of(old) != best]:
        old.unlink()
        _checksum_path(old).unlink(missing_ok=True)
    return path


def newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is intact, as (step, state); None if there never was one.

    Damaged ones are named in a warning and skipped; UserError if no good one is left.
    """
    damaged = []
    for path in _all(folder):
        if is_intact(path):
            return _step_of(path), _load(path)
        damaged.append(path.name)
        log.warning("%s is damaged (it does not match its checksum); trying the one before it", path)
    if damaged:
        raise UserError(
            f"{folder}: no good checkpoint is left ({', '.join(damaged)} damaged); start again in a new run folder"
        )
    return None


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that matches its checksum; None if there is none."""
    return next((path for path in _all(folder) if is_intact(path)), None)


def of_step(folder: Path, step: int) -> dict[str, Any] | None:
    """The checkpoint of a step; None when it is missing or damaged."""
    path = folder / f"step-{step:08d}.pt"
    return _load(path) if is_intact(path) else None


def steps_in(folder: Path) -> list[int]:
    """The steps of the folder's checkpoints, the newest first, damaged ones included."""
    return [_step_of(path) for path in _all(folder)]


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def verdicts(folder: Path) -> dict[str, bool]:
    """Each checkpoint's name, newest first, and whether it is intact."""
    return {path.name: is_intact(path) for path in _all(folder)}


def is_intact(path: Path) -> bool:
    """Whether a checkpoint matches its checksum."""
    try:
        return path.is_file() and _digest(path) in read_text(_checksum_path(path), max_bytes=1000).split()
    except (OSError, UserError):
        return False


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint's content; UserError where torch's restricted unpickler refuses it."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # Any error may come of any bytes. Torch's own words are left out: they advise to unpickle freely.
        raise UserError(_not_ours(path, f"{type(error).__name__} while it was read")) from error
    if not isinstance(state, dict):
        raise UserError(_not_ours(path, f"it holds a {type(state).__name__}"))
    return state


def _not_ours(path: Path, reason: str) -> str:
    return f"{path}: is not a checkpoint of this program ({reason}); delete it to resume from an older one"


def unwritten(path: Path, folder: Path, error: Exception) -> UserError:
    """The message for something that cannot be written; `folder` is that of the checkpoints."""
    good = newest_good(folder)
    kept = f"the newest good checkpoint is {good}" if good else "there is no earlier checkpoint"
    return UserError(
        f"{path}: cannot be written ({_reason(error)}); {kept}. Free some space (or fix the folder), then resume with "
        "--resume"
    )


def _reason(error: Exception) -> str:
    """torch and safetensors wrap the cause, such as `No space left on device`, in errors of their own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
