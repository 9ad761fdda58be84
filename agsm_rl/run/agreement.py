"""Did a run's terms help or fight each other? The cosines between their gradients, from metrics.jsonl, in words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PREFIX = "cosine/"
SMALL = 0.1
"""A mean cosine smaller than this, of either sign, is neither agreement nor conflict."""


@dataclass(frozen=True)
class Agreement:
    """Two terms' gradients over a run: the mean cosine in [-1, 1] with its 95 % interval, over `steps` common steps."""

    first: str
    second: str
    steps: int
    cosine: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low > SMALL:
            verdict = "agreed: a step for one also served the other"
        elif self.high < -SMALL:
            verdict = "were in conflict: a step for one undid part of the other's (see `combine:`)"
        elif self.low > -SMALL and self.high < SMALL:
            verdict = "were orthogonal: they neither helped nor fought each other"
        else:
            verdict = "showed no clear agreement or conflict"
        figures = f"mean cosine {self.cosine:+.3f} [{self.low:+.3f}, {self.high:+.3f}] over {self.steps} common steps"
        return f"the gradients of {self.first} and {self.second} {verdict} ({figures})"


def agreements(rows: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """The agreement of every two terms that both ran in at least two of the rows of a run's metrics.jsonl.

    The interval is Student's over steps, which are taken as independent: it says how certain the mean is, not what
    another seed would give.
    """
    cosines: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(PREFIX) and isinstance(value, int | float):
                cosines.setdefault(key, []).append(float(value))
    return [_agreement(key, values) for key, values in cosines.items() if len(values) > 1]


def agreements_to_json(agreed: list[Agreement]) -> list[dict[str, Any]]:
    """For eval.json: the figures, and the sentence."""
    return [asdict(agreement) | {"sentence": str(agreement)} for agreement in agreed]


def _agreement(key: str, values: list[float]) -> Agreement:
    from scipy import stats  # here: it takes most of a second, and few runs have two terms

    first, _, second = key.removeprefix(PREFIX).partition("/")
    mean, error = sum(values) / len(values), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Agreement(first, second, len(values), mean, mean - half, mean + half)
