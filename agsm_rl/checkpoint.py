"""Checkpoints: written aside, checksummed, renamed; the newest good one is found and damaged ones are named."""

import hashlib
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from agsm_rl.errors import UserError

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})\.pt")


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2, best: int | None = None) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`; the `keep` newest and that of `best` stay.

    The checksum is written before the checkpoint gets its name, so that a kill at any instant leaves a good one behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    aside = path.with_suffix(".partial")
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    _checksum_path(path).write_text(_digest(aside) + "\n")
    aside.replace(path)
    others = [old for old in _all(folder)[keep:] if _step_of(old) != best]
    for old in others:
        old.unlink()
        _checksum_path(old).unlink(missing_ok=True)
    return path


def newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole, as (step, state); None if there was never one.

    Damaged ones are named in a warning and passed over; UserError if no good one is left.
    """
    damaged = []
    for path in _all(folder):
        state = _load(path)
        if state is not None:
            return _step_of(path), state
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
    return _load(path) if path.exists() else None


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _load(path: Path) -> dict[str, Any] | None:
    checksum = _checksum_path(path)
    if not checksum.exists() or checksum.read_text().strip() != _digest(path):
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: it is no checkpoint of this program ({str(error).splitlines()[0]})") from error
    return state


def _all(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), reverse=True)


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
