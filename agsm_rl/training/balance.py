"""Weights as shares of the step: each term's gradient is divided by the running mean of its own length.

A loss's scale says nothing about how far it moves the parameters: with `sum` alone, a weight of 1 may be a thousandth
of the step on one model and all of it on another. Balanced, a term's gradient is on average as long as its weight.
GradNorm (arXiv 1711.02257) learns such weights from the terms' training rates; here they are given.
"""

import math
from collections.abc import Mapping
from typing import Any


class GradientBalance:
    """The running mean of each term's gradient norm, and the factor that brings its gradients to length 1.

    Args:
        decay: The share of the mean that is kept at each of a term's steps, in [0, 1). The mean is unbiased from its
            first value on, as Adam's are (arXiv 1412.6980).
    """

    def __init__(self, decay: float = 0.98) -> None:
        self.decay = decay
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def factor(self, term: str, norm: float) -> float:
        """Take in the norm of a term's newest gradient, before its weight; 1 over the mean of its norms.

        A gradient of 0 leaves the mean as it is, and before there is a mean the factor is 1.
        """
        if norm > 0 and math.isfinite(norm):
            self._sums[term] = self.decay * self._sums.get(term, 0.0) + (1 - self.decay) * norm
            self._counts[term] = self._counts.get(term, 0) + 1
        if term not in self._sums:
            return 1.0
        return (1 - self.decay ** self._counts[term]) / self._sums[term]

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, by term."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
