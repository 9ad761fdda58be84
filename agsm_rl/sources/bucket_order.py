"""An endless, seeded order of batches, each of one bucket, the same however many processes read it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.sources.order import Order
from agsm_rl.sources.rows import Row, ShuffledRows


class BucketOrder:
    """Rows in a fresh permutation each epoch; each waits in its bucket until that has a batch of `batch_size` rows.

    What waits at the end of an epoch goes into the next one's batches: over the epochs, each row comes as often as any
    other. `bucket_of` holds the bucket of each row.
    """

    def __init__(self, bucket_of: Sequence[int], *, batch_size: int, seed: int, name: str) -> None:
        self.bucket_of, self.batch_size = list(bucket_of), batch_size
        self._order = Order(len(self.bucket_of), seed, name)
        self._waiting: dict[int, list[int]] = {bucket: [] for bucket in sorted(set(self.bucket_of))}
        self._distinct: set[int] | None = None

    def take(self, key: Callable[[int], object] | None = None) -> list[int]:
        """The next batch. With `key`, rows whose key already waits in their bucket are skipped.

        In a bucket with fewer different keys than a batch has rows, the rule is dropped.
        """
        distinct = set() if key is None else self._with_distinct(key)
        while True:
            (row,) = self._order.take(1)
            bucket = self.bucket_of[row]
            waiting = self._waiting[bucket]
            if key is not None and bucket in distinct and key(row) in map(key, waiting):
                continue
            waiting.append(row)
            if len(waiting) == self.batch_size:
                self._waiting[bucket] = []
                return waiting

    def after(self, row: int) -> int | None:
        """The next row of the same bucket; None if there is no other."""
        count = len(self.bucket_of)
        others = ((row + step) % count for step in range(1, count))
        return next((other for other in others if self.bucket_of[other] == self.bucket_of[row]), None)

    def _with_distinct(self, key: Callable[[int], object]) -> set[int]:
        """The buckets that have a batch of rows with different keys."""
        if self._distinct is None:
            keys: dict[int, set[object]] = {bucket: set() for bucket in self._waiting}
            for row, bucket in enumerate(self.bucket_of):
                keys[bucket].add(key(row))
            self._distinct = {bucket for bucket, different in keys.items() if len(different) >= self.batch_size}
        return self._distinct

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read, and what waits in the buckets."""
        return {"position": self._order.position, "waiting": [list(rows) for rows in self._waiting.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there; UserError where the state is of other buckets."""
        waiting = state.get("waiting")
        if waiting is None or len(waiting) != len(self._waiting) or not self._are_of_their_buckets(waiting):
            raise UserError(
                "checkpoint: its data set had other `buckets` than this recipe's; use the run's recipe and data"
            )
        self._order.position = int(state["position"])
        self._waiting = {
            bucket: [int(row) for row in rows] for bucket, rows in zip(self._waiting, waiting, strict=True)
        }

    def _are_of_their_buckets(self, waiting: Sequence[Sequence[int]]) -> bool:
        """Whether these rows, one list per bucket, are where they wait in this order too."""
        places = [(row, bucket) for bucket, rows in zip(self._waiting, waiting, strict=True) for row in rows]
        return all(0 <= row < len(self.bucket_of) and self.bucket_of[row] == bucket for row, bucket in places)


class BucketedRows(ShuffledRows):
    """Rows of a data set that has numbers, a batch of one bucket at a time; `bucket_of` holds that of each row.

    `newest` is the number of a row of the newest batch.
    """

    def __init__(
        self,
        found: Any,
        *,
        bucket_of: Sequence[int],
        batch_size: int,
        seed: int,
        name: str,
        kept: list[int] | None = None,
    ) -> None:
        super().__init__(found, seed=seed, name=name, kept=kept)
        chosen = bucket_of if kept is None else [bucket_of[number] for number in kept]
        self._buckets = BucketOrder(chosen, batch_size=batch_size, seed=seed, name=name)
        self.newest = 0

    def take(self, count: int, own: slice, *, distinct: str | None = None) -> list[Row]:
        """The `own` ones of the next batch, which has the order's `batch_size` rows."""
        key = None if distinct is None else self._column(distinct)
        numbers = [self._number(index) for index in self._buckets.take(key)[own]]
        self.newest = numbers[0]
        return [(number, self.found[number]) for number in numbers]

    def after(self, number: int) -> Row | None:
        """The next one in the data set of the same bucket."""
        following = self._buckets.after(number if self._kept is None else self._kept.index(number))
        return None if following is None else (self._number(following), self.found[self._number(following)])

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read, and what waits in the buckets."""
        return self._buckets.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there; UserError where the state is a stream's, or of other buckets."""
        if "position" not in state:
            raise UserError("checkpoint: its data set was streamed, this recipe's is not; use the run's recipe")
        self._buckets.load_state_dict(state)
