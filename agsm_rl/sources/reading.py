"""Reading rows of strangers' data: a row that cannot be read is named, counted and replaced by the next one.

The replacement depends only on the row, so that a resumed run and a run on more processes see the same.
"""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Shard
from agsm_rl.sources.rows import Row, Rows

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 8
"""Consecutive rows that may be unreadable before the data set is refused."""
NAMED = 10
"""Rows that are named one by one; the others are only counted."""


class Reader(Generic[T]):
    """Reads the rows that `rows` gives by `read`, which raises UserError for a row that cannot be used.

    `skipped` counts, over all processes, how often a row was replaced; it belongs in the source's state.
    """

    def __init__(self, rows: Rows, read: Callable[[Row], T], *, shard: Shard, where: str) -> None:
        self.rows, self._read, self._shard, self._where = rows, read, shard, where
        self.skipped = 0
        self._named: set[int] = set()

    def take(self, count: int, own: slice, *, device: torch.device, distinct: str | None = None) -> list[T]:
        """The `own` ones of the next `count` rows, read; UserError if the rows after a bad one are bad too."""
        found, bad = [], 0
        for row in self.rows.take(count, own, distinct=distinct):
            value, passed_over = self._first_good(row)
            found.append(value)
            bad += passed_over
        self.skipped += int(self._shard.gather(torch.tensor([float(bad)], device=device)).sum())
        return found

    def _first_good(self, row: Row) -> tuple[T, int]:
        first: UserError | None = None
        for tries in range(PATIENCE):
            try:
                return self._read(row), tries
            except UserError as error:
                first = first or error
                self._name(row[0], error)
            following = self.rows.after(row[0])
            if following is None:
                break
            row = following
        raise UserError(f"{self._where}: {tries + 1} consecutive rows cannot be read; the first: {first}")

    def _name(self, number: int, error: UserError) -> None:
        if number in self._named:
            return
        self._named.add(number)
        if len(self._named) <= NAMED:
            log.warning("skipped: %s", error)
        if len(self._named) == NAMED:
            log.warning("%s: more rows are skipped; the metric rows_skipped counts them", self._where)

    def metrics(self) -> dict[str, float]:
        """`rows_skipped`, once there are any."""
        return {"rows_skipped": float(self.skipped)} if self.skipped else {}
