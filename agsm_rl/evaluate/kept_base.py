"""The base's measurements between runs: measured once for each base and settings, then read from the cache.

A measurement is a file with its first pictures beside it (kept_measurements.py), in a folder for each base:
`figures-<digest of the base>-<format>`. The file's name has a digest of everything that decides the figures
(base_settings.py). Processes and runs that need the same figures at the same time wait for the one that measures them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from agsm_rl.evaluate.base_settings import FORMAT, NotKept, base_settings, identity_of
from agsm_rl.evaluate.kept_measurements import measurement_file, read_measurement, write_measurement
from agsm_rl.evaluate.measured import Entry, Measured, from_rows
from agsm_rl.files import MAX_BYTES, write_text
from agsm_rl.interfaces import Backbone
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import Block, Evaluate
from agsm_rl.sources.cache_folder import cache_folder
from agsm_rl.training.processes import Processes

POLL = 1.0
"""Seconds between two looks at whether another run has measured the base."""


class KeptBase:
    """Reads a base's measurements from the cache, and keeps those that had to be made.

    Args:
        block: The backbone's in the recipe.
        parts: Loads the recipe's suites and rewards.
        tell: Prints a line.
        check: Called while another run measures; may raise Interrupted.
    """

    def __init__(
        self,
        block: Block,
        parts: Parts,
        *,
        tell: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.block, self.parts, self.tell, self.check = block, parts, tell, check
        self._base = ""
        self._said: set[str] = set()

    def measured(
        self,
        backbone: Backbone,
        entry: Entry,
        options: Evaluate,
        guidance: float,
        measure: Callable[[], Measured],
        *,
        processes: Processes | None = None,
    ) -> Measured:
        """The base's measurement: read, or made by `measure`. All processes of a run must call this.

        With `keep_base: false`, it is made and not kept.
        """
        place = self._place(backbone, entry, options, guidance) if options.keep_base else None
        if place is None:
            return measure()
        file, settings = place
        before, is_main = _written_at(file), _is_main(processes)
        kept = self._read(file, entry, guidance, processes)
        if kept is not None:
            return kept
        with self._measuring(file, processes):
            # Only the first process reads and writes it; has another run measured it in between?
            if _agreed(lambda: not is_main or _written_at(file) != before, processes):
                kept = self._read(file, entry, guidance, processes)
            if kept is None:
                kept = measure()
                if _is_main(processes):
                    self._write(file, settings, kept)
            return kept

    def _place(
        self, backbone: Backbone, entry: Entry, options: Evaluate, guidance: float
    ) -> tuple[Path, dict[str, Any]] | None:
        """The measurement's file and its settings; None where it is not kept."""
        try:
            self._base = self._base or identity_of(backbone)
            of_base = (self._base, backbone, self.block)
            settings = base_settings(*of_base, entry, options, guidance, self.parts)
        except NotKept as reason:
            self._say(f"the base's figures of {entry.name} are not kept for other runs: {reason}")
            return None
        folder = cache_folder() / f"figures-{self._base}-{FORMAT}"
        return measurement_file(folder, options.blocks[entry.name].use, guidance, settings), settings

    def _read(self, file: Path, entry: Entry, guidance: float, processes: Processes | None) -> Measured | None:
        """The kept measurement as the first process sees it, on all processes."""
        kept = read_measurement(file, entry, guidance) if _is_main(processes) else None
        if processes is not None and processes.count > 1:
            shares = processes.gather_objects([None if kept is None else (kept.judged, kept.pictures)])
            if shares[0] is None:
                return None
            judged, pictures = shares[0]
            kept = from_rows(entry, guidance, judged, {})
            kept.pictures = pictures
        if kept is not None:
            self._say(
                f"the base's figures of {entry.name}, measured earlier with the same settings, are read from "
                f"{file.parent} (evaluate.keep_base: false measures them again)"
            )
        return kept

    @contextmanager
    def _measuring(self, file: Path, processes: Processes | None) -> Iterator[None]:
        """Within the block, no other run measures this."""
        lock, waited = FileLock(file.with_suffix(".lock")), False
        try:
            while not _agreed(lambda: self._take(lock, file, processes), processes):
                if not waited:
                    self._say(f"waiting for another run, which measures the base on {file.stem.partition('-')[0]}")
                waited = True
            yield
        finally:
            lock.release()

    def _take(self, lock: FileLock, file: Path, processes: Processes | None) -> bool:
        """Whether the lock is ours; also where there can be none."""
        self.check()
        if not _is_main(processes):
            return True
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=POLL)
        except Timeout:
            return False
        except OSError:  # `_write` says so
            return True
        return True

    def _write(self, file: Path, settings: dict[str, Any], measured: Measured) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            about = file.parent / "about.json"
            if not about.exists():
                note = {"kind": "figures of a base", "of": self.block.options.get("checkpoint"), "use": self.block.use}
                write_text(about, json.dumps(note | {"base": settings["base"]}, indent=1) + "\n")
            write_measurement(file, settings, measured)
            if file.stat().st_size > MAX_BYTES:
                file.unlink()
                self._say(f"the base's figures are not kept for other runs: they take more than {MAX_BYTES:,} bytes")
        except OSError as error:
            self._say(
                f"the base's figures are not kept for other runs: {file.parent} cannot be written "
                f"({error.strerror or error}); set AGSM_RL_CACHE to another folder, or write evaluate.keep_base: false"
            )

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.tell(line)


def _is_main(processes: Processes | None) -> bool:
    return processes is None or processes.index == 0


def _written_at(file: Path) -> int | None:
    """When the file was written, in nanoseconds; None where there is none."""
    with suppress(OSError):
        return file.stat().st_mtime_ns
    return None


def _agreed(call: Callable[[], bool], processes: Processes | None) -> bool:
    """The call's answer if it is the same on all processes, else False; what it raises on one, all raise."""
    answer, stop = False, None
    try:
        answer = call()
    except Exception as error:  # noqa: BLE001 - whatever ends the wait here ends it on all processes
        stop = error
    shares = [(stop, answer)]
    if processes is not None and processes.count > 1:
        shares = processes.gather_objects(shares)
    for stopped, _ in shares:
        if stopped is not None:
            raise stopped
    return all(agrees for _, agrees in shares)
