"""What a draw keeps of its steps for the policy gradient that learns from them: their distributions, with the graph."""

from collections.abc import Sequence

import torch
from torch import Tensor


class KeptGraph:
    """The distributions of `steps` as they were drawn, with the graph to the parameters, for the first term that asks.

    A graph can be used by one backward pass only; later terms compute the distributions again.
    """

    def __init__(self, rows: Tensor, steps: Sequence[int]) -> None:
        self._first, self._wanted = int(rows[0]), steps
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, k: int, mean: Tensor, std: Tensor) -> None:
        """Keep step k, if it is one of `steps`, for the next rows: mean [b, C, h, w], standard deviation (0-d)."""
        if k in self._wanted:
            self._steps.setdefault(k, []).append((mean, std))

    def holds(self, steps: Sequence[int]) -> bool:
        """Whether none of these steps has been taken yet."""
        return all(k in self._steps for k in steps)

    def take(self, steps: Sequence[int], rows: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Means [B, C, h, w] and standard deviations (0-d) of the steps, for rows by their numbers; each only once."""
        if not self.holds(steps):
            return None
        found = []
        for k in steps:
            parts = self._steps.pop(k)
            mean = parts[0][0] if len(parts) == 1 else torch.cat([mean for mean, _ in parts])
            found.append((mean[rows.to(mean.device) - self._first], parts[0][1]))
        return found
