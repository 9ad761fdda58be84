"""Intervals over requirements and training seeds: right where they can be checked, honest where clusters are few."""

from functools import partial

import numpy as np
import pytest
from statsmodels.api import OLS
from statsmodels.stats.sandwich_covariance import cov_cluster

from agsm_rl.evaluate.intervals import mean_of, paired_difference, wilson
from agsm_rl.report.compare import Layout, Quantity, estimate
from agsm_rl.report.requirements import requirements_of

NAMES = ("counting", "colors")


def marks(seed: int, seeds: int, prompts: int, share: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, prompts)) < share


def tags_of(prompts: int) -> list[str]:
    return [NAMES[number % 3 > 0] for number in range(prompts)]


def estimates(quantities, tags, names, requirements=None):
    """The estimates where each image has a prompt of its own, and a requirement of its own unless they are given."""
    prompts = [f"prompt {number}" for number in range(len(tags))]
    return estimate(quantities, Layout(tags, names, prompts, requirements or prompts))


def bounds(part) -> tuple[float, float, float]:
    return part.value, part.low, part.high


def test_the_estimate_is_the_mean_over_tags_of_the_mean_over_seeds_and_images():
    tags, after, before = tags_of(60), marks(0, 3, 60, 0.7), marks(1, 3, 60, 0.4)
    requirements = [number // 4 for number in range(60)]
    found = estimates({"change": Quantity(after, before)}, tags, NAMES, requirements)["change"]
    by_tag = {}
    for name in NAMES:
        values = [float(after[s, p]) - float(before[s, p]) for s in range(3) for p in range(60) if tags[p] == name]
        by_tag[name] = sum(values) / len(values)
    assert {name: part.value for name, part in found.tags.items()} == pytest.approx(by_tag)
    assert found.overall.value == pytest.approx(sum(by_tag.values()) / 2)
    assert np.mean(found.by_seed) == pytest.approx(found.overall.value) and len(found.by_seed) == 3


def sandwich(values: np.ndarray, clusters: np.ndarray) -> float:
    """statsmodels' variance of the mean with one kind of cluster, without its factor for the number of coefficients."""
    fit = OLS(values, np.ones_like(values)).fit()
    return float(cov_cluster(fit, clusters)[0, 0]) / (len(values) / (len(values) - 1)) * (1 - 1 / len(values)) ** -1


def test_the_variances_are_those_of_statsmodels_cluster_sandwiches():
    rng, seeds, size = np.random.default_rng(3), 4, 15
    requirements = np.repeat(np.arange(size), rng.integers(1, 6, size))
    effect = rng.normal(0, 2, size)[requirements] + rng.normal(0, 1, (seeds, 1))
    values = effect + rng.normal(0, 1, (seeds, len(requirements)))
    flat, of_row = values.ravel(), np.tile(requirements, seeds)
    of_seed = np.repeat(np.arange(seeds), len(requirements))
    by_requirement, by_seed = (cov(flat, of) for cov, of in ((sandwich, of_row), (sandwich, of_seed)))
    layout = partial(Layout, ["counting"] * len(requirements), ["counting"], [str(n) for n in range(len(requirements))])
    found = estimate({"change": Quantity(values, share=False)}, layout(list(requirements)))["change"].overall
    # Of all rows in one cell each, the rest is small beside both.
    cells = np.stack([np.bincount(requirements, row) / np.bincount(requirements) for row in values])
    rest = cells - cells.mean(axis=0) - cells.mean(axis=1, keepdims=True) + cells.mean()
    assert found.error**2 == pytest.approx(by_requirement + by_seed, rel=0.1)
    assert found.error**2 < by_requirement + by_seed and (rest**2).mean() < 0.5
    one = estimate({"change": Quantity(values[:1], share=False)}, layout(list(requirements)))["change"].overall
    assert one.error**2 == pytest.approx(sandwich(values[0], requirements)) and one.df == size - 1


def test_where_only_seeds_differ_the_interval_is_students_over_seeds():
    from scipy.stats import t

    by_seed = np.array([0.1, 0.4, 0.2, 0.7, 0.35])
    values = np.tile(by_seed[:, None], (1, 40))
    found = estimates({"change": Quantity(values, share=False)}, ["counting"] * 40, ["counting"])["change"].overall
    low, high = t.interval(0.95, 4, by_seed.mean(), by_seed.std(ddof=1) / np.sqrt(5))
    assert bounds(found) == pytest.approx((by_seed.mean(), low, high)) and found.df == pytest.approx(4)


def test_images_of_one_requirement_count_as_one_cluster():
    rng, seeds = np.random.default_rng(5), 3
    requirements = [number // 20 for number in range(200)]
    right = rng.choice([0.1, 0.9], 10)[requirements]
    score = rng.random((seeds, 200)) < right
    apart = estimates({"score": Quantity(score)}, ["counting"] * 200, ["counting"])["score"].overall
    together = estimates({"score": Quantity(score)}, ["counting"] * 200, ["counting"], requirements)["score"].overall
    assert together.value == pytest.approx(apart.value) and together.high - together.low > 3 * (apart.high - apart.low)
    assert together.df < 10 < apart.df


def test_a_tag_of_few_requirements_has_few_degrees_of_freedom_and_so_has_the_mean_that_it_decides():
    rng, tags = np.random.default_rng(0), ["colors"] * 80 + ["counting"] * 80
    requirements = [number // 40 for number in range(80)] + [100 + number // 2 for number in range(80)]
    right = np.concatenate([np.repeat([0.1, 0.9], 40), np.full(80, 0.5)])
    found = estimates({"score": Quantity(rng.random((5, 160)) < right)}, tags, NAMES, requirements)["score"]
    assert found.tags["colors"].df == pytest.approx(1, abs=0.1) and found.tags["counting"].df > 3
    assert found.overall.df < 2
    assert bounds(found.tags["colors"])[1:] == (0, 1)


def test_with_one_seed_the_interval_is_over_requirements_only():
    tags, requirements = ["counting"] * 60, [number // 3 for number in range(60)]
    score = marks(0, 1, 60)
    found = estimates({"score": Quantity(score)}, tags, ["counting"], requirements)["score"].overall
    means = score[0].reshape(20, 3).mean(axis=1)
    assert found.error == pytest.approx(means.std(ddof=1) / np.sqrt(20)) and found.df == pytest.approx(19)


def test_prompts_of_a_number_weigh_alike_whatever_images_they_have():
    prompts = ["a dog"] * 8 + ["a cat"] * 2
    values = np.array([[1.0] * 8 + [3.0] * 2])
    layout = Layout(["mine"] * 10, ["mine"], prompts, prompts)
    assert estimate({"score": Quantity(values, share=False)}, layout)["score"].overall.value == pytest.approx(2)


def test_seeds_that_disagree_widen_the_interval():
    prompts = 200
    alike = np.tile(marks(0, 1, prompts), (4, 1))
    apart = np.stack([marks(seed, 1, prompts, share)[0] for seed, share in enumerate((0.2, 0.4, 0.6, 0.8))])
    found = estimates({"alike": Quantity(alike), "apart": Quantity(apart)}, ["counting"] * prompts, ["counting"])
    widths = {key: value.overall.high - value.overall.low for key, value in found.items()}
    assert widths["apart"] > 2 * widths["alike"]


def test_swapping_two_models_mirrors_their_difference():
    tags, one, other = tags_of(60), marks(0, 3, 60, 0.7), marks(1, 3, 60, 0.4)
    found = estimates({"there": Quantity(one, other), "back": Quantity(other, one)}, tags, NAMES)
    there, back = found["there"], found["back"].mirrored()
    for one, other in [(there.overall, back.overall), *((there.tags[name], back.tags[name]) for name in NAMES)]:
        assert bounds(one) == pytest.approx(bounds(other)) and one.p_value == pytest.approx(other.p_value)
    assert there.by_seed == pytest.approx(back.by_seed)


def test_an_interval_excludes_zero_exactly_where_the_p_value_is_below_a_twentieth():
    tags = ["counting"] * 90
    changes = {share: Quantity(marks(0, 4, 90, share), marks(1, 4, 90, 0.5)) for share in (0.5, 0.55, 0.6, 0.65, 0.8)}
    found = [part.overall for part in estimates(changes, tags, ["counting"]).values()]
    assert {part.excludes_zero for part in found} == {True, False}
    assert [part.excludes_zero for part in found] == [part.p_value < 0.05 for part in found]


def test_verdicts_that_never_change_still_leave_doubt():
    same = marks(0, 3, 30)
    change = estimates({"change": Quantity(same, same)}, ["counting"] * 30, ["counting"])["change"]
    assert change.overall.value == 0 and change.overall.low < -0.02 and change.overall.high > 0.02
    assert change.overall.p_value == 1
    perfect = estimates({"score": Quantity(np.ones((3, 30), bool))}, ["counting"] * 30, ["counting"])["score"]
    assert perfect.overall.value == pytest.approx(1) and perfect.overall.low < 0.95


def test_verdicts_that_never_change_have_the_interval_of_eval_json_over_images():
    tags, after, before = tags_of(90), np.ones((1, 90), bool), np.zeros((1, 90), bool)
    found = estimates({"score": Quantity(after), "change": Quantity(after, before)}, tags, NAMES)
    for name in NAMES:
        count = tags.count(name)
        assert bounds(found["score"].tags[name]) == pytest.approx(bounds(wilson(count, count)))
        change = paired_difference([False] * count, [True] * count)
        assert bounds(found["change"].tags[name]) == pytest.approx(bounds(change))
    assert bounds(found["score"].overall) == pytest.approx(bounds(mean_of(list(found["score"].tags.values()))))


def test_no_interval_reaches_past_what_a_share_can_be():
    best, worst = np.array([[True] * 7 + [False], [True] * 4 + [False] * 4]), np.zeros((2, 8), bool)
    worst[0, 0] = True
    quantities = {"best": Quantity(best), "worst": Quantity(worst), "change": Quantity(best, worst)}
    found = {key: value.overall for key, value in estimates(quantities, ["counting"] * 8, ["counting"]).items()}
    assert found["best"].high <= 1 and found["worst"].low >= 0 and found["change"].high <= 1


def test_what_else_is_estimated_does_not_alter_an_interval():
    tags, one, other = tags_of(60), marks(0, 3, 60, 0.7), marks(1, 3, 60, 0.4)
    alone = estimates({"one": Quantity(one)}, tags, NAMES)["one"]
    among = estimates({"other": Quantity(other), "one": Quantity(one), "few": Quantity(one[:2])}, tags, NAMES)["one"]
    assert bounds(alone.overall) == pytest.approx(bounds(among.overall))


def test_a_tag_with_one_image_leaves_the_mean_over_tags_its_doubt_whatever_the_seeds():
    tags = ["a"] * 40 + ["b"]
    right = np.array([[number % 2 == 0 for number in range(40)] + [True]])
    one, three = (
        estimates({"one": Quantity(np.repeat(right, seeds, axis=0))}, tags, ["a", "b"])["one"] for seeds in (1, 3)
    )
    assert three.overall.low <= one.overall.low + 1e-9 and three.overall.high >= one.overall.high - 1e-9


def test_a_tag_with_one_image_has_an_interval_over_the_seeds():
    # As small an evaluation as there is: one image of each tag.
    found = estimates({"score": Quantity(np.array([[1, 0], [1, 1]]) > 0)}, list(NAMES), NAMES)["score"]
    assert found.overall.value == 0.75 and found.tags["colors"].value == 0.5
    assert found.tags["colors"].low == 0 and found.tags["colors"].high == 1
    assert bounds(found.tags["counting"]) == pytest.approx(bounds(wilson(1, 1)))
    single = estimates({"score": Quantity(np.array([[True, False]]))}, list(NAMES), NAMES)["score"].overall
    assert single.low < 0.2 and single.high > 0.8


def test_wordings_of_one_requirement_are_one_and_prompts_of_ones_own_stay_apart():
    one, other, third = requirements_of("shapes", ("a photo of two red stars", "two red stars", "three red stars"))
    assert one == other != third
    pairs = ("a red star and a blue circle", "a blue circle and a red star", "a red circle and a blue star")
    one_way, other_way, another = requirements_of("shapes", pairs)
    assert one_way == other_way != another
    places = ("a star right of a circle", "a circle left of a star", "a star above a circle", "a circle below a star")
    right, left, above, below = requirements_of("shapes", places)
    assert right == left != above == below
    left, right = requirements_of("scenes", ("a star left of a circle", "a circle right of a star"))
    assert left == right
    pairs = ("a star and a ring", "a ring and a star", "a small star and a ring")
    pair, turned, sized = requirements_of("scenes", pairs)
    assert pair == turned != sized
    assert requirements_of("rewards", ("a photo of two red stars", "two red stars"))[0] == one
    assert requirements_of("rewards", ("two red stars", "a photo of a bench")) is None
