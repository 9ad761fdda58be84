"""95 % intervals for shares of correct images, their paired differences, and means over tags.

Shares: Wilson (statsmodels). Paired differences: Agresti and Min, Statistics in Medicine 2005 (the normal interval
after half an observation is added to each of the four cells, so that it does not collapse when no verdict changed).
Means over tags: the tags' intervals combined (Zou and Donner, Statistics in Medicine 2008). Means of scores: bootstrap
over prompts (scipy), because the images of one prompt resemble each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, norm
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

CONFIDENCE = 0.95
BATCH = 500
"""Bootstrap samples drawn at a time; only the memory depends on it."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True for a difference that the interval tells from none."""
        return self.low > 0 or self.high < 0


def wilson(correct: int, total: int) -> Interval:
    """A share of correct ones with its Wilson interval; ValueError for an empty or impossible count."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total} is no share")
    low, high = proportion_confint(correct, total, alpha=1 - CONFIDENCE, method="wilson")
    # At 0 and 1 the formula's rounding may leave the estimate just outside.
    value = correct / total
    return Interval(value, min(float(low), value), max(float(high), value))


def paired_difference(base: Sequence[bool], trained: Sequence[bool]) -> Interval:
    """Share correct of `trained` minus that of `base`, both on the same prompts and noise, in [-1, 1]."""
    if len(base) != len(trained) or not len(base):
        raise ValueError(f"paired verdicts are wanted, one or more; got {len(base)} and {len(trained)}")
    changes = np.asarray(trained, dtype=float) - np.asarray(base, dtype=float)
    # Half an observation in each cell: one more gain and loss by half each, one more pair without a change.
    values, weights = np.append(changes, [1.0, -1.0, 0.0]), np.append(np.ones(len(changes)), [0.5, 0.5, 1.0])
    stats = DescrStatsW(values, weights=weights, ddof=0)
    reach = float(norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(stats.var / stats.sum_weights))
    center, value = float(stats.mean), float(changes.mean())
    return Interval(value, max(-1.0, min(center - reach, value)), min(1.0, max(center + reach, value)))


def mean_of(parts: Sequence[Interval]) -> Interval:
    """The mean of independent estimates (a tag each), each with the same weight as GenEval gives it."""
    if not parts:
        raise ValueError("a mean of no estimates")
    value = float(np.mean([part.value for part in parts]))
    below = float(np.linalg.norm([part.value - part.low for part in parts])) / len(parts)
    above = float(np.linalg.norm([part.high - part.value for part in parts])) / len(parts)
    return Interval(value, value - below, value + above)


def mean_over_prompts(values: Sequence[float]) -> Interval:
    """The mean of one value a prompt, with its bias-corrected and accelerated bootstrap interval over prompts.

    The interval is NaN for a single prompt: there is nothing to tell the spread from.
    """
    data = np.asarray(values, dtype=float)
    if not len(data):
        raise ValueError("a mean of no prompts")
    value = float(data.mean())
    if len(data) == 1:
        return Interval(value, float("nan"), float("nan"))
    if np.ptp(data) == 0:
        return Interval(value, value, value)
    found = bootstrap((data,), np.mean, confidence_level=CONFIDENCE, batch=BATCH, rng=np.random.default_rng(0))
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def mean_of_groups(groups: Sequence[Sequence[float]]) -> Interval:
    """The mean of the groups' means (GenEval's overall score), by bootstrap over the prompts within each group.

    NaN bounds where a group has a single prompt.
    """
    data = [np.asarray(group, dtype=float) for group in groups]
    value = float(np.mean([group.mean() for group in data]))
    if min(len(group) for group in data) < 2:
        return Interval(value, float("nan"), float("nan"))

    def statistic(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([part.mean(axis=axis) for part in parts], axis=0)

    found = bootstrap(
        data,
        statistic,
        method="percentile",
        vectorized=True,
        confidence_level=CONFIDENCE,
        batch=BATCH,
        rng=np.random.default_rng(0),
    )
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def win_rate(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """The share of images scored above the other's image of the same prompt and noise; a tie is half a win.

    Scores of each prompt's images, paired. The interval is Wilson's with a prompt as the unit: a prompt whose images
    win and lose counts in part, which makes it wide rather than narrow.
    """
    shares = []
    for own, other in zip(ours, theirs, strict=True):
        pairs = np.asarray(own, dtype=float) - np.asarray(other, dtype=float)
        shares.append(float(np.mean((np.sign(pairs) + 1) / 2)))
    low, high = proportion_confint(sum(shares), len(shares), alpha=1 - CONFIDENCE, method="wilson")
    value = float(np.mean(shares))
    return Interval(value, min(float(low), value), max(float(high), value))
