"""Scores and paired differences with 95 % intervals, over training seeds and prompts.

A score is a share of right images, and overall the mean over tags; or it is a number per image, and overall the mean
over prompts, each prompt's images averaged first.

Every run of a variant uses the same prompts, so seeds and prompts are crossed, not nested. Both are resampled
independently (prompts within their tag, each with all its images), and a resample is the table of drawn seeds by drawn
prompts (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007; it errs on the wide side). A small sample of
seeds understates their spread, so their deviations are widened by √(S / (S − 1)). With one seed the intervals are over
images only, as in eval.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from agsm_rl.evaluate.intervals import CONFIDENCE, Interval, mean_of, mean_over_prompts, paired_difference, wilson

RESAMPLES = 4000
BATCH = 500
"""Resamples drawn at a time; affects only the memory used."""
RANDOM_SEED = 0
ROUNDING = 1e-9
"""A narrower interval counts as empty: identical resamples differ only by rounding."""

WHOLE = "\0"
"""In place of a tag's name: all images, of which a number is the mean."""

Table = NDArray[Any]
"""Figures of a variant: [seeds, images], true where correct, or a number."""


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of scores: overall, each tag's, and overall by seed."""

    overall: Interval
    tags: dict[str, Interval]
    by_seed: tuple[float, ...]

    def mirrored(self) -> Estimate:
        """For a difference: the same with the two models swapped."""
        tags = {name: _mirrored(part) for name, part in self.tags.items()}
        return Estimate(_mirrored(self.overall), tags, tuple(-value for value in self.by_seed))


def _mirrored(part: Interval) -> Interval:
    return Interval(-part.value, -part.high, -part.low)


@dataclass(frozen=True)
class Quantity:
    """What is estimated: a score, or its difference from `minus`, row by row and image by image. [S, N] each.

    `share`: whether the figures say right or wrong; else they are numbers in any unit.
    """

    marks: Table
    minus: Table | None = None
    share: bool = True

    @property
    def values(self) -> Table:
        """Per seed and image; of shares, in [-1, 1]."""
        marks = self.marks.astype(float)
        return marks if self.minus is None else marks - self.minus

    @property
    def range(self) -> tuple[float, float]:
        """Where an interval ends at the latest."""
        if not self.share:
            return -np.inf, np.inf
        return (0.0 if self.minus is None else -1.0), 1.0

    def over_images(self, chosen: Table, prompts: Sequence[str]) -> Interval:
        """The interval for a single run: over the first seed's images among `chosen`, or over their prompts."""
        if not self.share:
            # In the prompts' own order, as the evaluation has it: what is drawn depends on the order.
            order: dict[str, int] = {}
            prompt_of = np.array([order.setdefault(prompts[row], len(order)) for row in chosen])
            sums = np.bincount(prompt_of, weights=self.values[0][chosen])
            return mean_over_prompts(list(sums / np.bincount(prompt_of)))
        marks = self.marks[0][chosen]
        if self.minus is None:
            return wilson(int(marks.sum()), len(marks))
        return paired_difference(list(self.minus[0][chosen]), list(marks))


def estimate(
    quantities: Mapping[Any, Quantity], tags: Sequence[str], names: Sequence[str], prompts: Sequence[str]
) -> dict[Any, Estimate]:
    """The estimates of all quantities. `tags` and `prompts` are those of each image, `names` the tags in their order.

    The images of a prompt are resampled together.
    """
    by_tag = {name: np.flatnonzero(np.array([tag == name for tag in tags])) for name in names}
    estimates: dict[Any, Estimate] = {}
    for share, rows in ((True, by_tag), (False, by_tag | {WHOLE: np.arange(len(tags))})):
        alike = {key: item for key, item in quantities.items() if item.share is share}
        estimates |= {key: _over_images(item, rows, prompts) for key, item in alike.items() if len(item.marks) == 1}
        for size in sorted({len(item.marks) for item in alike.values()} - {1}):
            group = {key: item for key, item in alike.items() if len(item.marks) == size}
            estimates |= _over_seeds(group, rows, prompts)
    return {key: estimates[key] for key in quantities}


def _over_images(quantity: Quantity, rows: Mapping[str, Table], prompts: Sequence[str]) -> Estimate:
    tags = {name: quantity.over_images(chosen, prompts) for name, chosen in rows.items()}
    overall = tags.pop(WHOLE) if WHOLE in tags else mean_of(list(tags.values()))
    return Estimate(overall, tags, (overall.value,))


def _over_seeds(
    quantities: Mapping[Any, Quantity], rows: Mapping[str, Table], prompts: Sequence[str]
) -> dict[Any, Estimate]:
    """Several seeds: one bootstrap for all quantities, which see the same resamples and are all of one kind."""
    values = np.stack([item.values for item in quantities.values()])
    count = values.shape[1]
    # For each of a tag's images: the index of its prompt among the tag's.
    prompt_of = [np.unique([prompts[row] for row in chosen], return_inverse=True)[1] for chosen in rows.values()]
    sizes = [int(numbers.max()) + 1 for numbers in prompt_of]
    share = next(iter(quantities.values())).share
    image_weights = [np.ones(len(of)) if share else 1 / np.bincount(of)[of] for of in prompt_of]

    def statistic(seeds: Table, *drawn_prompts: Table, axis: int = -1) -> Table:
        """The quantities' scores [K, tags + 1, resamples], the mean over tags first."""
        parts = []
        seed_weights = _shares(seeds, count)
        parts_drawn = zip(rows.values(), drawn_prompts, prompt_of, sizes, image_weights, strict=True)
        for chosen, drawn, numbers, size, own_weights in parts_drawn:
            weights = _shares(drawn % size, size)[:, numbers] * own_weights
            by_seed = values[:, :, chosen] @ (weights / weights.sum(axis=1, keepdims=True)).T
            center = by_seed.mean(axis=1)
            deviation = (by_seed * seed_weights.T).sum(axis=1) - center
            parts.append(center + np.sqrt(count / (count - 1)) * deviation)
        by_tag = np.stack(parts, axis=1)
        return np.concatenate([by_tag.mean(axis=1, keepdims=True), by_tag], axis=1)

    # scipy's bootstrap needs two of what it draws: a tag's only prompt counts as two equal ones.
    samples = (np.arange(count), *(np.arange(max(size, 2)) for size in sizes))
    interval = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(RANDOM_SEED),
    ).confidence_interval
    # Widened deviations may leave a share's range.
    floor, ceiling = np.array([item.range for item in quantities.values()]).T[:, :, None]
    lows, highs = np.maximum(interval.low, floor), np.minimum(interval.high, ceiling)
    # [K, seeds, tags]
    means = zip(rows.values(), image_weights, strict=True)
    scores = np.stack(
        [(values[:, :, chosen] * weights).sum(axis=2) / weights.sum() for chosen, weights in means], axis=2
    )
    estimates = {}
    for index, (key, quantity) in enumerate(quantities.items()):
        tags = {}
        for place, (name, chosen) in enumerate(rows.items()):
            low, high = float(lows[index, place + 1]), float(highs[index, place + 1])
            value = float(scores[index, :, place].mean())
            tags[name] = _interval(value, low, high, partial(quantity.over_images, chosen, prompts))
        if WHOLE in tags:
            by_seed, overall = scores[index, :, -1], tags.pop(WHOLE)
        else:
            by_seed = scores[index].mean(axis=1)
            low, high = float(lows[index, 0]), float(highs[index, 0])
            overall = _interval(float(by_seed.mean()), low, high, partial(mean_of, list(tags.values())))
        estimates[key] = Estimate(overall, tags, tuple(float(score) for score in by_seed))
    return estimates


def _shares(drawn: Table, size: int) -> Table:
    """The share of each resample [B, n] that each of `size` items has, [B, size]."""
    drawn = np.atleast_2d(drawn).astype(int)
    offset = np.arange(len(drawn))[:, None] * size
    return np.bincount((drawn + offset).ravel(), minlength=len(drawn) * size).reshape(len(drawn), size) / drawn.shape[1]


def _interval(value: float, low: float, high: float, over_images: Callable[[], Interval]) -> Interval:
    """The bootstrap's interval, or that over a single run's images if all resamples are equal."""
    if high - low > ROUNDING:
        return Interval(value, min(low, value), max(high, value))
    doubt = over_images()
    return Interval(value, min(doubt.low, value), max(doubt.high, value))
