"""Scores and paired differences with 95 % intervals over requirements and training seeds.

A score is a share of right images, and overall the mean over tags; or it is a number per image, and overall the mean
over prompts, each prompt's images averaged first.

Every run of a variant draws the same prompts, so seeds and requirements are crossed, not nested: intervals_clustered
has the estimate. With one seed the intervals are over requirements only. Where no figure varies from one requirement or
seed to another (all are right, or no verdict changes), the interval is that of one run's images.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from agsm_rl.evaluate.intervals import CONFIDENCE, Interval, mean_of, mean_over_prompts, paired_difference, wilson
from agsm_rl.evaluate.intervals_clustered import Clustered, Clusters, clustered_means

WHOLE = "\0"
"""In place of a tag's name: all images, of which a number is the mean."""

Table = NDArray[Any]
"""Figures of a variant: [seeds, images], true where correct, or a number."""


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of scores: overall, each tag's, and overall by seed."""

    overall: Clustered
    tags: dict[str, Clustered]
    by_seed: tuple[float, ...]

    def mirrored(self) -> Estimate:
        """For a difference: the same with the two models swapped."""
        tags = {name: part.mirrored() for name, part in self.tags.items()}
        return Estimate(self.overall.mirrored(), tags, tuple(-value for value in self.by_seed))


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


@dataclass(frozen=True)
class Layout:
    """What the images are of: each one's tag, prompt and requirement, and the tags' names in their order."""

    tags: Sequence[str]
    names: Sequence[str]
    prompts: Sequence[str]
    requirements: Sequence[Hashable]

    def rows(self, name: str) -> Table:
        """The images of a tag, or all."""
        return np.flatnonzero([name in (WHOLE, tag) for tag in self.tags])

    def clusters(self, *, share: bool, whole: bool) -> Clusters:
        """Shares weigh images alike within a tag, numbers their prompts; `whole` leaves tags out."""
        groups = [WHOLE] * len(self.tags) if whole else list(self.tags)
        if not whole and set(groups) != set(self.names):
            raise ValueError(f"the tags are {sorted(set(groups))}, not {sorted(self.names)}")
        kinds = list(zip(groups, self.prompts, strict=True))
        counts: dict[tuple[str, str], int] = {}
        for kind in kinds:
            counts[kind] = counts.get(kind, 0) + 1
        weights = None if share else [1 / counts[kind] for kind in kinds]
        return Clusters.of(groups, (self.requirements, self.prompts, range(len(groups))), weights)


def estimate(quantities: Mapping[Any, Quantity], layout: Layout) -> dict[Any, Estimate]:
    """The estimates of all quantities."""
    estimates: dict[Any, Estimate] = {}
    for share in (True, False):
        alike = {key: item for key, item in quantities.items() if item.share is share}
        if not alike:
            continue
        by_tag = layout.clusters(share=share, whole=False)
        whole = None if share else layout.clusters(share=False, whole=True)
        for size in sorted({len(item.marks) for item in alike.values()}):
            group = {key: item for key, item in alike.items() if len(item.marks) == size}
            estimates |= _of_seeds(group, layout, by_tag, whole)
    return {key: estimates[key] for key in quantities}


def _of_seeds(
    quantities: Mapping[Any, Quantity], layout: Layout, by_tag: Clusters, whole: Clusters | None
) -> dict[Any, Estimate]:
    """Quantities of one kind with equally many seeds. `whole`: the overall figure is the mean over all prompts."""
    values = np.stack([item.values for item in quantities.values()])
    of_tags = clustered_means(values, by_tag)
    overalls = of_tags if whole is None else clustered_means(values, whole)
    order = list(dict.fromkeys(layout.tags))
    # A tag of one image says nothing of its spread, and then nor does the mean over tags.
    lone = (by_tag if whole is None else whole).members.min() == 1
    estimates = {}
    for place, (key, quantity) in enumerate(quantities.items()):
        parts = dict(zip(order, of_tags.groups[place], strict=True))
        tags = {
            name: _interval(quantity, parts[name], partial(quantity.over_images, layout.rows(name), layout.prompts))
            for name in layout.names
        }
        over_images: Callable[[], Interval] = partial(mean_of, list(tags.values()))
        if whole is not None:
            over_images = partial(quantity.over_images, layout.rows(WHOLE), layout.prompts)
        overall = _interval(quantity, overalls.overall[place], over_images)
        if lone:
            alone = _interval(quantity, replace(overall, error=0.0), over_images)
            overall = alone if values.shape[1] == 1 else _wider(overall, alone)
        estimates[key] = Estimate(overall, tags, tuple(float(score) for score in overalls.by_seed[place]))
    return estimates


def _wider(of_seeds: Clustered, of_tags: Clustered) -> Clustered:
    """Both intervals' bounds: one knows nothing of a single image's spread, the other nothing of what seeds share."""
    low, high = min(of_seeds.low, of_tags.low), max(of_seeds.high, of_tags.high)
    return Clustered(of_seeds.value, low, high, max(of_seeds.error, of_tags.error), of_seeds.df)


def _interval(quantity: Quantity, part: Clustered, over_images: Callable[[], Interval]) -> Clustered:
    """The interval within the quantity's range, or that over a single run's images if nothing varies."""
    if part.error > 0:
        floor, ceiling = quantity.range
        return Clustered(part.value, max(part.low, floor), min(part.high, ceiling), part.error, part.df)
    doubt = over_images()
    error = (doubt.high - doubt.low) / 2 / float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    return Clustered(part.value, min(doubt.low, part.value), max(doubt.high, part.value), error, np.inf)
