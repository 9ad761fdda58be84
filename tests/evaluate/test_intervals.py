"""Intervals cover what they should, pair what is paired, and never collapse for want of changes."""

import numpy as np
import pytest

from agsm_rl.evaluate.intervals import (
    Interval,
    mean_of,
    mean_of_groups,
    mean_over_prompts,
    paired_difference,
    wilson,
    win_rate,
)


def test_wilson_gives_the_textbook_interval() -> None:
    share = wilson(8, 10)
    assert (share.value, round(share.low, 4), round(share.high, 4)) == (0.8, 0.4902, 0.9433)


@pytest.mark.parametrize("correct", [0, 7])
def test_all_right_or_all_wrong_still_leaves_doubt(correct) -> None:
    share = wilson(correct, 7)
    assert share.low <= share.value <= share.high and share.high - share.low > 0.3


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_an_impossible_share_is_refused(correct, total) -> None:
    with pytest.raises(ValueError, match="not a valid share"):
        wilson(correct, total)


def test_no_change_is_a_difference_of_zero_with_an_interval_that_more_pairs_narrow() -> None:
    few, many = (paired_difference([True, False] * n, [True, False] * n) for n in (5, 500))
    assert few.value == many.value == 0
    assert few.low < many.low < 0 < many.high < few.high


def test_a_gain_on_the_same_images_is_told_apart_where_unpaired_shares_would_not_be() -> None:
    base, trained = [True] * 50 + [False] * 50, [True] * 62 + [False] * 38
    assert paired_difference(base, trained).excludes_zero
    assert wilson(50, 100).high > wilson(62, 100).low


def test_swapping_the_two_mirrors_the_difference() -> None:
    rng = np.random.default_rng(0)
    base, trained = rng.random(80) < 0.4, rng.random(80) < 0.6
    there, back = paired_difference(list(base), list(trained)), paired_difference(list(trained), list(base))
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_the_interval_of_a_difference_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(1000):
        hard = rng.random(100)
        base, trained = (hard + rng.normal(0, 0.2, 100) < level for level in (0.5, 0.6))
        # The truth of this model, from two million draws.
        hits.append(covers(paired_difference(list(base), list(trained)), TRUE_GAIN))
    assert 0.93 <= np.mean(hits) <= 0.98


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def true_gain() -> float:
    rng = np.random.default_rng(1)
    hard = rng.random(500_000)
    return float(
        np.mean(hard + rng.normal(0, 0.2, hard.size) < 0.6) - np.mean(hard + rng.normal(0, 0.2, hard.size) < 0.5)
    )


TRUE_GAIN = true_gain()


@pytest.mark.parametrize("total", [1, 2, 20])
def test_the_estimate_lies_in_its_interval_even_when_every_verdict_turned(total) -> None:
    gain = paired_difference([False] * total, [True] * total)
    assert gain.value == 1 and gain.low <= 1 <= gain.high <= 1


def test_verdicts_that_are_not_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="paired verdicts"):
        paired_difference([True], [True, False])


def test_the_mean_of_equal_tags_is_narrower_than_each_by_the_root_of_their_number() -> None:
    part = Interval(0.5, 0.4, 0.7)
    mean = mean_of([part] * 4)
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.5, 0.45, 0.6))


def test_a_bootstrap_interval_of_a_mean_is_near_the_normal_one_and_the_same_each_time() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = mean_over_prompts(list(values))
    reach = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.015)
    assert mean_over_prompts(list(values)) == found


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    found = mean_over_prompts([0.5])
    assert found.value == 0.5 and np.isnan(found.low) and np.isnan(found.high)
    assert np.isnan(mean_of_groups([[0.5], [1.0, 0.0]]).low)


def test_groups_weigh_alike_whatever_their_size_and_only_their_own_prompts_are_drawn() -> None:
    found = mean_of_groups([[1.0] * 50, [0.0, 1.0, 0.0, 1.0]])
    assert found.value == 0.75
    assert 0.5 <= found.low < 0.75 < found.high <= 1.0


def test_a_tie_is_half_a_win_and_winning_always_still_leaves_doubt() -> None:
    assert win_rate([[1.0], [2.0]], [[1.0], [1.0]]).value == 0.75
    always = win_rate([[1.0, 2.0]] * 10, [[0.0, 0.0]] * 10)
    assert always.value == always.high == 1 and 0.6 < always.low < 0.8
