"""95 % intervals for shares of correct images, their paired differences, and means over tags.

Shares: Wilson (statsmodels). Paired differences: Agresti and Min, Statistics in Medicine 2005 (the normal interval
with half an observation added to each of the four cells, so that it does not collapse if no verdict changes).
Means over tags: the tags' intervals combined (Zou and Donner, Statistics in Medicine 2008). Means of scores: bootstrap
over prompts (scipy), because the images of one prompt resemble each other. Both libraries are imported where they are
used: a recipe that names a suite is checked without them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
BATCH = 500
"""Bootstrap samples drawn at a time; affects only the memory used."""
ROUNDING = 1e-12
"""Values that differ by less than this share of their size are equal: there is nothing to draw from."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if the interval shows a difference."""
        return self.low > 0 or self.high < 0


def wilson(correct: int, total: int) -> Interval:
    """The share of correct items with its Wilson interval; ValueError for an empty or impossible count."""
    from statsmodels.stats.proportion import proportion_confint

    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total} is not a valid share")
    low, high = proportion_confint(correct, total, alpha=1 - CONFIDENCE, method="wilson")
    # At 0 and 1 the formula's rounding may leave the estimate just outside.
    value = correct / total
    return Interval(value, min(float(low), value), max(float(high), value))


def paired_difference(base: Sequence[bool], trained: Sequence[bool]) -> Interval:
    """Share correct of `trained` minus that of `base`, both on the same prompts and noise, in [-1, 1]."""
    from scipy.stats import norm
    from statsmodels.stats.weightstats import DescrStatsW

    if len(base) != len(trained) or not len(base):
        raise ValueError(f"need one or more paired verdicts; got {len(base)} and {len(trained)}")
    changes = np.asarray(trained, dtype=float) - np.asarray(base, dtype=float)
    # Half an observation per cell: half a gain, half a loss, and a whole pair without change.
    values, weights = np.append(changes, [1.0, -1.0, 0.0]), np.append(np.ones(len(changes)), [0.5, 0.5, 1.0])
    stats = DescrStatsW(values, weights=weights, ddof=0)
    reach = float(norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(stats.var / stats.sum_weights))
    center, value = float(stats.mean), float(changes.mean())
    return Interval(value, max(-1.0, min(center - reach, value)), min(1.0, max(center + reach, value)))


def mean_of(parts: Sequence[Interval]) -> Interval:
    """The mean of independent estimates, one per tag, equally weighted as in GenEval."""
    if not parts:
        raise ValueError("cannot average zero estimates")
    value = float(np.mean([part.value for part in parts]))
    below = float(np.linalg.norm([part.value - part.low for part in parts])) / len(parts)
    above = float(np.linalg.norm([part.high - part.value for part in parts])) / len(parts)
    return Interval(value, value - below, value + above)


def mean_over_prompts(values: Sequence[float]) -> Interval:
    """The mean of one value per prompt, with its bias-corrected and accelerated bootstrap interval over prompts.

    The interval is NaN for a single prompt: its spread is unknown.
    """
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    if not len(data):
        raise ValueError("cannot average over zero prompts")
    value = float(data.mean())
    if len(data) == 1:
        return Interval(value, float("nan"), float("nan"))
    if np.ptp(data) <= ROUNDING * np.abs(data).max():
        return Interval(value, value, value)
    result = bootstrap((data,), np.mean, confidence_level=CONFIDENCE, batch=BATCH, rng=np.random.default_rng(0))
    return Interval(value, float(result.confidence_interval.low), float(result.confidence_interval.high))


def ratio_over_prompts(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """The mean over all of several prompts' values, of which `sums` and `counts` are each prompt's.

    The interval is a percentile bootstrap over the prompts that have any; NaN for a single one.
    """
    data = (np.asarray(sums, dtype=float)[counts > 0], np.asarray(counts, dtype=float)[counts > 0])
    if not len(data[0]):
        raise ValueError("cannot average over zero prompts")
    value = float(data[0].sum() / data[1].sum())
    if len(data[0]) == 1:
        return Interval(value, float("nan"), float("nan"))
    if np.ptp(data[0] / data[1]) == 0:
        return Interval(value, value, value)
    from scipy.stats import bootstrap

    def statistic(total: np.ndarray, count: np.ndarray, axis: int = -1) -> np.ndarray:
        return total.sum(axis=axis) / count.sum(axis=axis)

    result = bootstrap(
        data,
        statistic,
        method="percentile",
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        batch=BATCH,
        rng=np.random.default_rng(0),
    )
    return Interval(value, float(result.confidence_interval.low), float(result.confidence_interval.high))


def mean_of_groups(groups: Sequence[Sequence[float]]) -> Interval:
    """The mean of the groups' means (GenEval's overall score), by bootstrap over the prompts within each group.

    The bounds are NaN if a group has a single prompt.
    """
    data = [np.asarray(group, dtype=float) for group in groups]
    value = float(np.mean([group.mean() for group in data]))
    if min(len(group) for group in data) < 2:
        return Interval(value, float("nan"), float("nan"))

    from scipy.stats import bootstrap

    def statistic(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([part.mean(axis=axis) for part in parts], axis=0)

    result = bootstrap(
        data,
        statistic,
        method="percentile",
        vectorized=True,
        confidence_level=CONFIDENCE,
        batch=BATCH,
        rng=np.random.default_rng(0),
    )
    return Interval(value, float(result.confidence_interval.low), float(result.confidence_interval.high))


def win_rate(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """The share of images scored above the other target's image for the same prompt and noise; a tie is half a win.

    Both arguments hold the scores of each prompt's images, paired. The interval is Wilson's with the prompt as the
    unit: a prompt with wins and losses counts as a fraction, which errs towards a wide interval.
    """
    from statsmodels.stats.proportion import proportion_confint

    shares = []
    for scores, rivals in zip(ours, theirs, strict=True):
        margins = np.asarray(scores, dtype=float) - np.asarray(rivals, dtype=float)
        shares.append(float(np.mean((np.sign(margins) + 1) / 2)))
    low, high = proportion_confint(sum(shares), len(shares), alpha=1 - CONFIDENCE, method="wilson")
    value = float(np.mean(shares))
    return Interval(value, min(float(low), value), max(float(high), value))
