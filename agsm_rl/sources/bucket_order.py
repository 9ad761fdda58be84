"""An endless, seeded order of batches, each of one bucket, the same however many processes read it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.sources.order import Order


class BucketOrder:
    """Rows in a fresh permutation each epoch; each waits in its bucket until that has a batch of rows.

    What waits at the end of an epoch goes into the next one's batches: over the epochs, each row comes as often as any
    other. `bucket_of` holds the bucket of each row. All batches must have the same number of rows.
    """

    def __init__(self, bucket_of: Sequence[int], seed: int, name: str) -> None:
        self.bucket_of = list(bucket_of)
        self._order = Order(len(self.bucket_of), seed, name)
        self._waiting: dict[int, list[int]] = {bucket: [] for bucket in sorted(set(self.bucket_of))}
        self._different: dict[int, int] = {}

    def take(self, count: int, key: Callable[[int], object] | None = None) -> list[int]:
        """The next batch of `count` rows. With `key`, rows whose key already waits in their bucket are skipped.

        In a bucket with fewer different keys than a batch has rows, the rule is dropped.
        """
        if key is not None and not self._different:
            self._different = self._count_keys(key)
        while True:
            (row,) = self._order.take(1)
            bucket = self.bucket_of[row]
            waiting = self._waiting[bucket]
            if key is not None and self._different[bucket] >= count and key(row) in map(key, waiting):
                continue
            waiting.append(row)
            if len(waiting) == count:
                self._waiting[bucket] = []
                return waiting

    def after(self, row: int) -> int | None:
        """The next row of the same bucket; None if there is no other."""
        count = len(self.bucket_of)
        others = ((row + step) % count for step in range(1, count))
        return next((other for other in others if self.bucket_of[other] == self.bucket_of[row]), None)

    def _count_keys(self, key: Callable[[int], object]) -> dict[int, int]:
        """How many different keys the rows of each bucket have."""
        keys: dict[int, set[object]] = {bucket: set() for bucket in self._waiting}
        for row, bucket in enumerate(self.bucket_of):
            keys[bucket].add(key(row))
        return {bucket: len(different) for bucket, different in keys.items()}

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read, and what waits in the buckets."""
        return {**self._order.state_dict(), "waiting": [list(rows) for rows in self._waiting.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there; UserError where the state is of other buckets."""
        waiting = state.get("waiting")
        if waiting is None or len(waiting) != len(self._waiting) or not self._are_of_their_buckets(waiting):
            raise UserError(
                "checkpoint: its data set had other `buckets` than this recipe's; use the run's recipe and data"
            )
        self._order.load_state_dict(state)
        self._waiting = {
            bucket: [int(row) for row in rows] for bucket, rows in zip(self._waiting, waiting, strict=True)
        }

    def _are_of_their_buckets(self, waiting: Sequence[Sequence[int]]) -> bool:
        """Whether these rows, one list per bucket, are where they wait in this order too."""
        places = [(row, bucket) for bucket, rows in zip(self._waiting, waiting, strict=True) for row in rows]
        return all(0 <= row < len(self.bucket_of) and self.bucket_of[row] == bucket for row, bucket in places)
