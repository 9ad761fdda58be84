"""An endless, seeded order over the rows of a data set, the same however many processes read it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from agsm_rl.training.randomness import stream


class Order:
    """Row numbers 0..length-1, a fresh permutation each epoch; `position` counts what was taken."""

    def __init__(self, length: int, seed: int, name: str) -> None:
        self.length, self.seed, self.name = length, seed, name
        self.position = 0
        self._epoch, self._permutation = -1, np.zeros(0, dtype=int)

    def take(self, count: int, key: Callable[[int], object] | None = None) -> list[int]:
        """The next `count` rows. With `key`, rows whose key was already taken in this batch are skipped.

        If there are too few different keys, the rule is dropped after two epochs.
        """
        rows: list[int] = []
        seen: set[object] = set()
        patience = 2 * self.length + count
        while len(rows) < count:
            row = self._at(self.position)
            self.position += 1
            patience -= 1
            if key is not None and patience > 0:
                if key(row) in seen:
                    continue
                seen.add(key(row))
            rows.append(row)
        return rows

    def after(self, row: int) -> int | None:
        """The row that follows in the data set; None if there is no other."""
        return None if self.length == 1 else (row + 1) % self.length

    def state_dict(self) -> dict[str, Any]:
        """How far the data set was read."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there."""
        self.position = int(state["position"])

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = stream(self.seed, f"{self.name}/order", epoch).permutation(self.length)
        return int(self._permutation[index])
