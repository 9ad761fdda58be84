"""95 % intervals over requirements and training seeds, which are crossed: every seed draws every requirement.

Images of one requirement resemble each other in every seed, and images of one seed across requirements, so neither the
image nor the prompt is the unit. Three mean squares of a balanced two-way layout say how much each moves the mean:

    V_seeds  of the seeds' means,     V_requirements  of the requirements' means within their group (tag),
    V_both   of what is left in a cell (seed × requirement), which is counted in both of the others.

    Var = V_both + max(V_seeds − V_both, 0) + max(V_requirements − V_both, 0)

and the interval is Student's t with Satterthwaite's degrees of freedom, Var² / Σ V_i² / df_i (Satterthwaite, Biometrics
Bulletin 1946; Searle, Casella and McCulloch, Variance Components, chapter 4). V_seeds and V_requirements are what the
two one-way cluster sandwiches of statsmodels give (a test holds them to it). Its two-way sandwich (Cameron, Gelbach and
Miller, J. Business & Economic Statistics 2011) is not used: it is too small for few seeds, and has no degrees of
freedom but the smaller number of clusters, which covers 99 to 100 %.
`benchmarks/interval_coverage.py` simulates what is used.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agsm_rl.evaluate.intervals import CONFIDENCE, Interval

Figures = NDArray[np.float64]
EMPTY = 1e-24
"""A smaller variance is rounding: nothing varies."""


@dataclass(frozen=True)
class Clustered(Interval):
    """An estimate with its interval, the standard error and the degrees of freedom behind it."""

    error: float
    df: float

    @property
    def p_value(self) -> float:
        """Of Student's two-sided test that the true value is 0."""
        from scipy.stats import t

        if not self.error > 0:
            return 1.0 if self.value == 0 else float("nan")
        return float(2 * t.sf(abs(self.value) / self.error, self.df))

    def mirrored(self) -> "Clustered":
        """The same with the opposite sign."""
        return Clustered(-self.value, -self.high, -self.low, self.error, self.df)


@dataclass(frozen=True)
class Clusters:
    """How images are nested: in clusters (requirements), and these in groups (tags), which weigh alike.

    Attributes:
        shares: Each image's share of its group's mean [N].
        order: The images, cluster by cluster [N].
        starts: Where each cluster begins in that order [C].
        weights: Each cluster's share of its group's mean [C].
        groups: Each cluster's group [C].
        members: The number of clusters of each group [G].
    """

    shares: Figures
    order: NDArray[np.intp]
    starts: NDArray[np.intp]
    weights: Figures
    groups: NDArray[np.intp]
    members: NDArray[np.intp]

    @classmethod
    def of(
        cls, groups: Sequence[Hashable], units: Sequence[Sequence[Hashable]], weights: Sequence[float] | None = None
    ) -> "Clusters":
        """Of each image's group and weight (alike, if not given).

        `units` are each image's clusters, coarsest first (requirement, prompt, image): a group that has only one of a
        kind is divided by the next, because one cluster says nothing of how clusters vary.
        """
        names = list(dict.fromkeys(groups))
        group_of = np.array([names.index(group) for group in groups])
        share = np.ones(len(group_of)) if weights is None else np.asarray(weights, dtype=float)
        share = share / np.bincount(group_of, share)[group_of]
        cluster_of = np.empty(len(group_of), dtype=int)
        cluster_groups: list[int] = []
        for group in range(len(names)):
            rows = np.flatnonzero(group_of == group)
            numbers = np.zeros(len(rows), dtype=int)
            for unit in units:
                order: dict[Hashable, int] = {}
                numbers = np.array([order.setdefault(unit[int(row)], len(order)) for row in rows])
                if len(order) > 1:
                    break
            cluster_of[rows] = len(cluster_groups) + numbers
            cluster_groups += [group] * (int(numbers.max()) + 1)
        images = np.argsort(cluster_of, kind="stable")
        starts = np.searchsorted(cluster_of[images], np.arange(len(cluster_groups)))
        of_cluster = np.array(cluster_groups)
        weights_of_clusters: Figures = np.add.reduceat(share[images], starts)
        return cls(share, images, starts, weights_of_clusters, of_cluster, np.bincount(of_cluster))

    def sums(self, values: Figures) -> Figures:
        """Each cluster's part of its group's mean [..., C], of the images' values [..., N]."""
        parts: Figures = np.add.reduceat((values * self.shares)[..., self.order], self.starts, axis=-1)
        return parts


@dataclass(frozen=True)
class Means:
    """Several quantities' means: by seed [K, S], and their clustered estimates, overall and by group."""

    by_seed: Figures
    overall: list[Clustered]
    groups: list[list[Clustered]]


def clustered_means(values: Figures, clusters: Clusters) -> Means:
    """The mean over groups of the mean over seeds and images of `values` [K, S, N], K quantities at once.

    With one seed the interval is over clusters only. An error is 0 where nothing varies.
    """
    count, members = values.shape[1], clusters.members
    in_group = np.equal.outer(clusters.groups, np.arange(len(members))).astype(float)
    correction = members / np.maximum(members - 1, 1)
    cells = clusters.sums(values)
    by_group = cells @ in_group  # [K, S, G]
    means = by_group.mean(axis=1)
    apart = cells - (means @ in_group.T * clusters.weights)[:, None]  # sums to 0 over seeds and a group's clusters
    of_cluster, of_seed = apart.mean(axis=1), by_group - means[:, None]
    between = of_cluster**2 @ in_group * correction  # [K, G]
    left = apart - of_cluster[:, None] - of_seed @ in_group.T * clusters.weights
    pairs = max(count * (count - 1), 1)
    both = (left**2).sum(axis=1) @ in_group * correction / pairs
    seeds, overall_seeds = (of_seed**2).sum(axis=1) / pairs, (of_seed.mean(axis=2) ** 2).sum(axis=1) / pairs
    degrees = np.maximum(members - 1, 1).astype(float)
    groups = [
        _estimates(means[:, place], seeds[:, place], between[:, [place]], both[:, [place]], degrees[[place]], count)
        for place in range(len(members))
    ]
    share = len(members) ** 2
    overall = _estimates(means.mean(axis=1), overall_seeds, between / share, both / share, degrees, count)
    by_quantity = [list(parts) for parts in zip(*groups, strict=True)]
    return Means(by_group.mean(axis=2), overall, by_quantity)


def _estimates(
    value: Figures, seeds: Figures, between: Figures, both: Figures, degrees: Figures, count: int
) -> list[Clustered]:
    """Variances of the seeds' means [K], and of the clusters' means and of the rest, by group [K, G]."""
    from scipy.stats import t

    rest, clusters = both.sum(axis=1), between.sum(axis=1)
    variance = rest + np.maximum(clusters - rest, 0)
    parts, free = [between], [np.broadcast_to(degrees, between.shape)]
    if count > 1:
        variance = variance + np.maximum(seeds - rest, 0)
        parts += [both, seeds[:, None]]
        free += [np.broadcast_to(degrees * (count - 1), both.shape), np.full((len(seeds), 1), count - 1.0)]
    squares, dfs = np.concatenate(parts, axis=1), np.concatenate(free, axis=1)
    total = (squares**2 / dfs).sum(axis=1)
    varies = variance > EMPTY
    # A difference of mean squares may have fewer degrees of freedom than any of its parts: not below the fewest.
    least = np.where(squares > EMPTY, dfs, np.inf).min(axis=1)
    df = np.where(varies, np.maximum(variance**2 / np.where(varies, total, 1.0), np.where(varies, least, 1.0)), 1.0)
    error = np.sqrt(np.where(varies, variance, 0.0))
    reach = t.ppf((1 + CONFIDENCE) / 2, df) * error
    columns = zip(value, value - reach, value + reach, error, df, strict=True)
    return [Clustered(*(float(figure) for figure in row)) for row in columns]
