"""Rows of a data set, batch after batch without end: shuffled by number, or in shuffled windows where it is a stream.

Both continue exactly where their state was taken, and give each process its share of what one process would take.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Shard
from agsm_rl.sources.bucket_order import BucketOrder
from agsm_rl.sources.order import Order
from agsm_rl.training.randomness import stream

Row = tuple[int, Mapping[str, Any]]
"""A row's number in the data set, and its columns."""

PATIENCE = 4
"""The most rows that a stream skips per row of a batch because their value was already taken."""


class Rows(Protocol):
    """An endless supply of a data set's rows."""

    def take(self, count: int, own: slice, *, distinct: str | None = None) -> list[Row]:
        """The `own` ones of the next `count` rows. With `distinct`, values of that column differ where possible."""
        ...

    def after(self, number: int) -> Row | None:
        """The row that replaces row `number` if that cannot be read; None if there is no other."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue exactly: plain values only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


def own_share(batch_size: int, shard: Shard, name: str) -> slice:
    """This process's part of a batch's rows; UserError if the processes cannot share it evenly."""
    check_divides("batch_size", batch_size, shard, name)
    share = batch_size // shard.count
    return slice(shard.index * share, (shard.index + 1) * share)


def check_divides(what: str, total: int, shard: Shard, name: str) -> None:
    """UserError where the run's processes cannot have equal shares of a total."""
    if total % shard.count:
        fitting = [str(count) for count in range(1, shard.count) if total % count == 0]
        raise UserError(
            f"{name}: {what} {total} is the total over all processes and cannot be divided among the {shard.count} "
            f"that were started; make it a multiple of {shard.count}, or start {' or '.join(fitting)}"
        )


class ShuffledRows:
    """Rows of a data set that has numbers, in a given order, which may be replaced before the first batch.

    The order counts the rows `kept` (None: all). `newest` is the number of a row of the newest batch.
    """

    def __init__(self, found: Any, order: Order | BucketOrder, *, kept: list[int] | None = None) -> None:
        self.found, self.order, self._kept = found, order, kept
        self.newest = 0
        self._values: dict[str, Any] = {}

    def take(self, count: int, own: slice, *, distinct: str | None = None) -> list[Row]:
        """The `own` ones of the next `count` rows; only they are read."""
        key = None if distinct is None else self._column(distinct)
        numbers = [self._number(index) for index in self.order.take(count, key)[own]]
        self.newest = numbers[0]
        return [(number, self.found[number]) for number in numbers]

    def upcoming(self, count: int, own: slice, *, distinct: str | None = None) -> list[int]:
        """The numbers of the rows that `take` will give next."""
        state = self.order.state_dict()
        key = None if distinct is None else self._column(distinct)
        numbers = [self._number(index) for index in self.order.take(count, key)[own]]
        self.order.load_state_dict(state)
        return numbers

    def after(self, number: int) -> Row | None:
        """The one that the order has after it."""
        index = self.order.after(number if self._kept is None else self._kept.index(number))
        if index is None:
            return None
        following = self._number(index)
        return following, self.found[following]

    def _number(self, index: int) -> int:
        return index if self._kept is None else self._kept[index]

    def _column(self, name: str) -> Callable[[int], str]:
        if name not in self._values:
            self._values[name] = self.found[name]
        return lambda index: str(self._values[name][self._number(index)])

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read."""
        return self.order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there; UserError where the state is a stream's, or of other buckets."""
        if "position" not in state:
            raise UserError("checkpoint: its data set was streamed, this recipe's is not; use the run's recipe")
        self.order.load_state_dict(state)


class StreamedRows:
    """Rows of a stream, in windows of `window` rows whose order is shuffled (1: as they come); epochs never end.

    `keep(row)` filters rows (None keeps all); `passed_over` counts those left out. Resuming rereads the last window.
    Each process reads the whole stream and takes its share, so that the batches do not depend on their number.
    """

    def __init__(
        self, found: Any, *, window: int, seed: int, name: str, where: str, keep: Callable[[Row], bool] | None = None
    ) -> None:
        self._found, self._size, self._seed, self._name, self._where = found, window, seed, name, where
        self._keep = keep
        self.passed_over = 0
        self._epoch, self._number = 0, 0
        self._iterator = iter(found)
        self._window: list[Row] = []
        self._used = 0
        self._mark = self._position()

    def take(self, count: int, own: slice, *, distinct: str | None = None) -> list[Row]:
        """The `own` ones of the next `count` rows."""
        rows: list[Row] = []
        seen: set[str] = set()
        patience = PATIENCE * count
        while len(rows) < count:
            if self._used == len(self._window):
                self._mark = self._position()
                self._read_window()
            row = self._window[self._used]
            self._used += 1
            if distinct is not None and patience > 0:
                patience -= 1
                value = str(row[1][distinct])
                if value in seen:
                    continue
                seen.add(value)
            rows.append(row)
        return rows[own]

    def after(self, number: int) -> Row | None:
        """The next one in the current window, whose order is always the same."""
        places = {row[0]: place for place, row in enumerate(self._window)}
        following = self._window[(places.get(number, -1) + 1) % len(self._window)]
        return None if following[0] == number else following

    def _position(self) -> dict[str, Any]:
        """Where the next window begins; the beginning of an epoch needs no stream state."""
        return {
            "epoch": self._epoch,
            "number": self._number,
            "passed_over": self.passed_over,
            "stream": self._found.state_dict() if self._number else None,
        }

    def _read_window(self) -> None:
        self._window, self._used = [], 0
        while not self._window:
            epoch, number = self._epoch, self._number
            self._window = self._read()
            if not self._window and number == 0:
                raise UserError(f"{self._where}: the stream has no usable rows; give another data set")
        order = stream(self._seed, f"{self._name}/order", epoch, number).permutation(len(self._window))
        self._window = [self._window[index] for index in order]

    def _read(self) -> list[Row]:
        """The next rows in the stream's order; fewer, or none, where an epoch ends."""
        rows: list[Row] = []
        while len(rows) < self._size:
            try:
                row = self._number, next(self._iterator)
            except StopIteration:
                self._begin(self._epoch + 1, 0, None)
                break
            self._number += 1
            if self._keep is None or self._keep(row):
                rows.append(row)
            else:
                self.passed_over += 1
        return rows

    def _begin(self, epoch: int, number: int, state: Mapping[str, Any] | None) -> None:
        self._epoch, self._number = epoch, number
        self._found.set_epoch(epoch)
        if state is not None:
            self._found.load_state_dict(dict(state))
        self._iterator = iter(self._found)

    def state_dict(self) -> dict[str, Any]:
        """Where the window began in the stream, and how much of it was used."""
        return {**self._mark, "used": self._used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; UserError where the state is not a stream's."""
        if "stream" not in state:
            raise UserError("checkpoint: its data set was not streamed, this recipe's is; use the run's recipe")
        self._mark = {key: value for key, value in state.items() if key != "used"}
        self.passed_over, self._window, self._used = int(state["passed_over"]), [], 0
        self._begin(int(state["epoch"]), int(state["number"]), state["stream"])
        if state["used"]:
            self._read_window()
            self._used = int(state["used"])
