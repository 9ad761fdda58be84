"""Intervals over training seeds and prompts: right where they can be checked, honest where seeds are few."""

import numpy as np
import pytest

from agsm_rl.evaluate.intervals import mean_of, paired_difference, wilson
from agsm_rl.report import compare
from agsm_rl.report.compare import Quantity, estimate

NAMES = ("counting", "colors")


def marks(seed: int, seeds: int, prompts: int, share: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, prompts)) < share


def tags_of(prompts: int) -> list[str]:
    return [NAMES[number % 3 > 0] for number in range(prompts)]


def over_images(quantities, tags, names):
    """The estimates where each image has a prompt of its own."""
    return estimate(quantities, tags, names, [f"prompt {number}" for number in range(len(tags))])


def test_with_one_seed_the_intervals_are_those_of_eval_json():
    tags, after, before = tags_of(90), marks(0, 1, 90, 0.6), marks(1, 1, 90, 0.4)
    found = over_images({"score": Quantity(after), "change": Quantity(after, before)}, tags, NAMES)
    rows = {name: [number for number, tag in enumerate(tags) if tag == name] for name in NAMES}
    scores = [wilson(int(after[0][rows[name]].sum()), len(rows[name])) for name in NAMES]
    changes = [paired_difference(list(before[0][rows[name]]), list(after[0][rows[name]])) for name in NAMES]
    assert list(found["score"].tags.values()) == scores and found["score"].overall == mean_of(scores)
    assert list(found["change"].tags.values()) == changes and found["change"].overall == mean_of(changes)


def test_the_estimate_is_the_mean_over_tags_of_the_mean_over_seeds_and_prompts():
    tags, after, before = tags_of(60), marks(0, 3, 60, 0.7), marks(1, 3, 60, 0.4)
    found = over_images({"change": Quantity(after, before)}, tags, NAMES)["change"]
    by_tag = {}
    for name in NAMES:
        values = [float(after[s, p]) - float(before[s, p]) for s in range(3) for p in range(60) if tags[p] == name]
        by_tag[name] = sum(values) / len(values)
    assert {name: part.value for name, part in found.tags.items()} == pytest.approx(by_tag)
    assert found.overall.value == pytest.approx(sum(by_tag.values()) / 2)
    assert np.mean(found.by_seed) == pytest.approx(found.overall.value) and len(found.by_seed) == 3


def test_the_interval_is_that_of_drawing_seeds_and_prompts_anew():
    rng, seeds, prompts = np.random.default_rng(3), 4, 45
    effect = np.array([-0.2, -0.05, 0.1, 0.15])[:, None]
    after, before = rng.random((seeds, prompts)) < 0.5 + effect, rng.random((seeds, prompts)) < 0.4
    tags, difference = tags_of(prompts), after.astype(float) - before
    found = over_images({"change": Quantity(after, before)}, tags, NAMES)["change"].overall
    # The same by plain loops: a seed's deviation counts sqrt(4 / 3) times, the mean over seeds as it is.
    groups = [[number for number, tag in enumerate(tags) if tag == name] for name in NAMES]
    drawn = []
    for _ in range(3000):
        chosen = rng.integers(seeds, size=seeds)
        score = 0.0
        for group in groups:
            columns = rng.choice(group, size=len(group))
            by_seed = difference[:, columns].mean(axis=1)
            score += by_seed.mean() + np.sqrt(4 / 3) * (by_seed[chosen].mean() - by_seed.mean())
        drawn.append(score / len(groups))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_images_of_one_prompt_are_drawn_together():
    rng, seeds = np.random.default_rng(5), 3
    sizes = np.array([1, 2, 5, 9, 3, 10])
    prompts = [f"prompt {number}" for number, size in enumerate(sizes) for _ in range(size)]
    right = np.array([0.1, 0.9, 0.2, 0.8, 0.5, 1.0])[[int(prompt.split()[1]) for prompt in prompts]]
    score = rng.random((seeds, len(prompts))) < right
    tags = ["counting"] * len(prompts)
    apart = over_images({"score": Quantity(score)}, tags, ["counting"])["score"].overall
    together = estimate({"score": Quantity(score)}, tags, ["counting"], prompts)["score"].overall
    assert together.value == apart.value and together.high - together.low > 1.3 * (apart.high - apart.low)
    # The same by plain loops over the prompts.
    columns = [[at for at, prompt in enumerate(prompts) if prompt == f"prompt {number}"] for number in range(6)]
    drawn = []
    for _ in range(3000):
        images = np.concatenate([columns[number] for number in rng.integers(6, size=6)])
        by_seed = score[:, images].mean(axis=1)
        drawn.append(by_seed.mean() + np.sqrt(3 / 2) * (by_seed[rng.integers(3, size=3)].mean() - by_seed.mean()))
    low, high = np.clip(np.quantile(drawn, [0.025, 0.975]), 0, 1)
    assert (together.low, together.high) == pytest.approx((low, high), abs=0.03)


def test_seeds_that_disagree_widen_the_interval():
    prompts = 200
    alike = np.tile(marks(0, 1, prompts), (4, 1))
    apart = np.stack([marks(seed, 1, prompts, share)[0] for seed, share in enumerate((0.2, 0.4, 0.6, 0.8))])
    found = over_images({"alike": Quantity(alike), "apart": Quantity(apart)}, ["counting"] * prompts, ["counting"])
    widths = {key: value.overall.high - value.overall.low for key, value in found.items()}
    assert widths["apart"] > 2 * widths["alike"]


def test_swapping_two_models_mirrors_their_difference():
    tags, one, other = tags_of(60), marks(0, 3, 60, 0.7), marks(1, 3, 60, 0.4)
    found = over_images({"there": Quantity(one, other), "back": Quantity(other, one)}, tags, NAMES)
    there, back = found["there"], found["back"].mirrored()
    for one, other in [(there.overall, back.overall), *((there.tags[name], back.tags[name]) for name in NAMES)]:
        assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))
    assert there.by_seed == pytest.approx(back.by_seed)


def test_verdicts_that_never_change_still_leave_doubt():
    same = marks(0, 3, 30)
    change = over_images({"change": Quantity(same, same)}, ["counting"] * 30, ["counting"])["change"]
    assert change.overall.value == 0 and change.overall.low < -0.02 and change.overall.high > 0.02
    perfect = over_images({"score": Quantity(np.ones((3, 30), bool))}, ["counting"] * 30, ["counting"])["score"]
    assert perfect.overall.value == 1 and perfect.overall.low < 0.95


def test_no_interval_reaches_past_what_a_share_can_be():
    best, worst = np.array([[True] * 7 + [False], [True] * 4 + [False] * 4]), np.zeros((2, 8), bool)
    worst[0, 0] = True
    quantities = {"best": Quantity(best), "worst": Quantity(worst), "change": Quantity(best, worst)}
    found = {key: value.overall for key, value in over_images(quantities, ["counting"] * 8, ["counting"]).items()}
    assert found["best"].high <= 1 and found["worst"].low >= 0 and found["change"].high <= 1


def test_what_else_is_estimated_does_not_alter_an_interval():
    tags, one, other = tags_of(60), marks(0, 3, 60, 0.7), marks(1, 3, 60, 0.4)
    alone = over_images({"one": Quantity(one)}, tags, NAMES)["one"]
    among = over_images({"other": Quantity(other), "one": Quantity(one), "few": Quantity(one[:2])}, tags, NAMES)["one"]
    assert (alone.overall.low, alone.overall.high) == pytest.approx((among.overall.low, among.overall.high))


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.08), (6, 0.02)])
def test_the_interval_covers_the_truth_at_least_about_as_often_as_it_says(seeds, spread, monkeypatch):
    monkeypatch.setattr(compare, "RESAMPLES", 400)
    rng, prompts, repeats, hits = np.random.default_rng(0), 120, 120, 0
    for _ in range(repeats):
        # A prompt's and a seed's own effect, both with mean 0, on a mean difference of 0.05.
        effect = 0.05 + rng.uniform(-0.3, 0.3, prompts)[None] + rng.normal(0, spread, (seeds, 1))
        luck = rng.random((seeds, prompts))
        after, before = luck < 0.4 + effect / 2, luck > 1 - (0.4 - effect / 2)
        part = over_images({"change": Quantity(after, before)}, ["counting"] * prompts, ["counting"])["change"].overall
        hits += part.low <= 0.05 <= part.high
    assert hits / repeats >= 0.89


def test_a_tag_with_one_prompt_has_an_interval_over_the_seeds():
    # As small an evaluation as there is: one image of each tag.
    found = over_images({"score": Quantity(np.array([[1, 0], [1, 1]]) > 0)}, list(NAMES), NAMES)["score"]
    assert found.overall.value == 0.75 and found.tags["colors"].value == 0.5
    assert found.tags["colors"].low == 0 and found.tags["colors"].high == 1
    assert found.tags["counting"] == wilson(1, 1)
