"""The files of a run that grow by a line per step, evaluation or event; each line is a JSON object."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from agsm_rl.files import check_regular, write_text
from agsm_rl.run.screen import tell
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.anomalies import Event

log = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: one line per step, each written whole; numbers that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Drop the lines after `step`, which will be written again, and damaged ones, such as a torn last line."""
        if self.path.exists():
            kept = [row for row in read_lines(self.path) if _step_of(row) <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the line of a step."""
        append_line(self.path, {"step": step} | finite(metrics))


class EventsFile(Callback):
    """events.jsonl: what a run's watches and rules saw. Each event is printed too, once even if the run is resumed."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self.console = path, console

    def add(self, event: Event) -> None:
        """Write and print an event."""
        if self.write(event):
            tell(self.console, event.message, style="yellow", important=True, prose=True)

    def write(self, event: Event) -> bool:
        """Write an event; False if it has been written before."""
        if event.to_json() in read_lines(self.path):
            return False
        append_line(self.path, event.to_json())
        return True

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Record what the trainer's watch saw in this step."""
        for event in trainer.watch.events:
            self.add(event)


def finite(metrics: Mapping[str, Any]) -> dict[str, float | str | None]:
    """JSON has no NaN: null stands for it. Text stays as it is."""
    return {
        name: value if isinstance(value, str) else float(value) if math.isfinite(value) else None
        for name, value in metrics.items()
    }


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append a line. OSError where the disk refuses, or where the path is a link or a pipe: neither is written to."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported by `write`, which knows no name
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file; none where there is no file.

    Damaged lines, such as the last one after a power cut, are left out, and a warning says how many.
    """
    if not path.exists():
        return []
    check_regular(path)
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows = [_row(line) for line in lines if line]
    if None in rows:
        log.warning("%s: damaged lines are left out: %d", path, rows.count(None))
    return [row for row in rows if row is not None]


def flush(path: Path) -> None:
    """Have all lines on the disk, where there are any."""
    with suppress(FileNotFoundError), path.open("rb+") as file:
        os.fsync(file.fileno())


def _row(line: str) -> dict[str, Any] | None:
    """The object in a line; None where it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _step_of(row: Mapping[str, Any]) -> float:
    step = row.get("step")
    return step if isinstance(step, int) else math.inf
