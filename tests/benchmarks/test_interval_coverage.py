"""The report's intervals hold the truth in about 95 of 100 simulated studies, and the page's table is the result's."""

import json

import interval_coverage
import numpy as np
import pytest
from interval_coverage import Design, Effects, bootstrapped, clustered, draw, effects_of, share_covered

RESULT = json.loads(interval_coverage.RESULT.read_text(encoding="utf-8"))
TAGS = [Effects(**part) for part in RESULT["effects"]["SoftREPA minus AGSM"]]


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_over_requirements_and_seeds_hold_the_truth_about_95_times_in_100(seeds):
    drawn = draw(np.random.default_rng(seeds), TAGS, Design((10,) * 6, (10,) * 6), seeds, 1000, skewed=False)
    assert 0.93 <= share_covered(clustered(drawn), drawn.truth) <= 0.97


def test_a_bootstrap_over_prompts_holds_it_too_seldom_where_a_requirement_has_several_wordings():
    tags = [Effects(0.1, 0.3, 0.01, 0.0, 0.2)] * 6
    drawn = draw(np.random.default_rng(0), tags, Design((10,) * 6, (12,) * 6), 5, 60, skewed=False)
    assert share_covered(bootstrapped(drawn, np.random.default_rng(0)), drawn.truth) < 0.85
    assert share_covered(clustered(drawn), drawn.truth) > 0.88


def test_the_effects_put_in_are_the_effects_found():
    known = Effects(0.1, 0.2, 0.1, 0.1, 0.4)
    drawn = draw(np.random.default_rng(0), [known], Design((400,), (12,)), 40, 1, skewed=False)
    values = np.repeat(drawn.values[0], 3, axis=1)  # of three images a prompt, only the mean is kept
    found = effects_of(values, list(np.repeat(drawn.requirements, 3)))
    assert (found.mean, found.requirements, found.seeds) == pytest.approx((0.1, 0.2, 0.1), abs=0.04)


def test_the_pages_table_is_made_of_the_recorded_result():
    assert interval_coverage.table(RESULT["coverage"]) in interval_coverage.PAGE.read_text(encoding="utf-8")
