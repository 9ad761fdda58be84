"""Did a run's terms help or fight each other? The cosines between their gradients, from metrics.jsonl, in words."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

PREFIX = "cosine/"
SMALL = 0.1
"""A mean cosine below this in size is called no agreement and no conflict."""


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
            verdict = "agreed: a step of one also served the other"
        elif self.high < -SMALL:
            verdict = "were in conflict: a step of one undid part of the other's (see `combine:`)"
        elif self.low > -SMALL and self.high < SMALL:
            verdict = "were orthogonal: they neither helped nor fought each other"
        else:
            verdict = "showed no clear agreement or conflict"
        figures = f"mean cosine {self.cosine:+.3f} [{self.low:+.3f}, {self.high:+.3f}] over {self.steps} common steps"
        return f"the gradients of {self.first} and {self.second} {verdict} ({figures})"


def agreements(metrics: Path) -> list[Agreement]:
    """Of each two terms that ran in at least two common steps of a run's metrics.jsonl.

    The interval is Student's over steps, taken as independent; it says how sure the mean is, not how the terms would
    do on another seed.
    """
    found: dict[str, list[float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        for key, value in row.items():
            if key.startswith(PREFIX):
                found.setdefault(key, []).append(float(value))
    return [_agreement(key, values) for key, values in found.items() if len(values) > 1]


def to_json(found: list[Agreement]) -> list[dict[str, Any]]:
    """For eval.json: the figures, and the sentence."""
    return [asdict(one) | {"sentence": str(one)} for one in found]


def _agreement(key: str, values: list[float]) -> Agreement:
    first, second = key.removeprefix(PREFIX).split("/")
    mean, error = sum(values) / len(values), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Agreement(first, second, len(values), mean, mean - half, mean + half)
