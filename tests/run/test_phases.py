"""A sentence on each part of a run: from metrics and scores that are known."""

import pytest

from agsm_rl.evaluate.intervals import Interval
from agsm_rl.run.phases import FEWEST_DRAWS, phases, story


def metrics(rows):
    """The rows of metrics.jsonl, with their steps."""
    return [{"step": step} | row for step, row in enumerate(rows, 1)]


def rows_of(*terms):
    """The metrics of steps, each with the losses of the terms that learned in it."""
    return [{f"{name}/loss": 0.5 for name in names} | {"loss": 0.5} for names in terms]


def test_terms_that_follow_each_other_are_told_apart_with_the_scores_at_their_ends():
    found = phases(metrics([*rows_of(["agsm"], ["agsm"]), *rows_of(["ddpo"], ["ddpo"])]))
    assert [(phase.terms, phase.first, phase.last) for phase in found] == [(("agsm",), 1, 2), (("ddpo",), 3, 4)]
    changes = {(0, 2): {"strict": Interval(0.2, 0.12, 0.27)}, (2, 4): {"strict": Interval(-0.05, -0.11, 0.02)}}
    scores = {0: {"strict": 0.3, "look": 1.0}, 2: {"strict": 0.5}, 4: {"strict": 0.45}}
    assert story(found, scores, lambda *ends: changes[ends]) == [
        "agsm learned in steps 1 to 2, with strict 0.3 -> 0.5 (+0.20 [+0.12, +0.27])",
        "ddpo learned in steps 3 to 4, with strict 0.5 -> 0.45 (−0.05 [−0.11, +0.02], not told apart)",
    ]


@pytest.mark.parametrize("change", [None, Interval(0.1, 0.05, 0.15)])
def test_a_score_whose_change_is_not_its_images_says_that_it_has_no_interval(change):
    found = phases(metrics([*rows_of(["agsm"]), *rows_of(["ddpo"])]))
    told = story(
        found, {0: {"fid": 30.0, "x": 1.0}, 1: {"fid": 20.0, "x": 1.5}}, lambda *ends: {"fid": change} if change else {}
    )
    assert told[0] == "agsm learned in steps 1 to 1, with fid 30 -> 20 (no interval), x 1 -> 1.5 (no interval)"


def test_a_change_may_differ_from_the_scores_by_rounding():
    found = phases(metrics([*rows_of(["agsm"]), *rows_of(["ddpo"])]))
    told = story(found, {0: {"x": 0.3}, 1: {"x": 0.4}}, lambda *ends: {"x": Interval(0.1 + 1e-9, 0.05, 0.15)})
    assert told[0].endswith("with x 0.3 -> 0.4 (+0.10 [+0.05, +0.15])")


def test_scores_are_left_out_where_one_end_was_not_measured():
    found = phases(metrics([*rows_of(["agsm"], ["agsm"]), *rows_of(["ddpo"], ["ddpo"])]))
    told = story(found, {0: {"strict": 0.3}, 4: {"strict": 0.45}})
    assert told == ["agsm learned in steps 1 to 2", "ddpo learned in steps 3 to 4"]


def test_terms_that_learn_in_turn_are_one_part():
    found = phases(metrics(rows_of(["agsm", "ddpo"], ["agsm"], ["agsm", "ddpo"], ["agsm"])))
    assert [(sorted(phase.terms), phase.first, phase.last) for phase in found] == [(["agsm", "ddpo"], 1, 4)]


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([1.0, 1.1, 1.5, 1.6, 2.0, 2.1], "rose, 1.05 to 2.05 (last third of 6 draws minus the first: +1 ["),
        ([2.0, 2.1, 1.5, 1.6, 1.0, 1.1], "fell, 2.05 to 1.05"),
        ([1.0, 3.0, 1.5, 1.6, 1.1, 3.1], "did not clearly move, 2 to 2.1"),
        ([1.0] * 3 + [0.5, 1.0, 0.5, 1.0, 1.0, 1.0], "did not clearly move, 1 to 1 (last third of 9"),
        ([0.0, 0.0, 0.5, 0.4, 1.0, 1.0], "rose, 0 to 1 (last third of 6 draws minus the first: +1 [+1, +1])"),
    ],
)
def test_what_the_draws_were_worth_is_told_with_its_interval(rewards, words):
    rows = [
        {"ddpo/loss": 0.1, "ddpo/reward": value, "ddpo/reward/sharpness": 7.0, "ddpo/reward_std/sharpness": place}
        for place, value in enumerate(rewards)
    ]
    assert f"the reward of the images drawn for ddpo {words}" in str(story(phases(metrics(rows)), {}))


def test_the_interval_is_welchs():
    from scipy import stats

    from agsm_rl.run.phases import Draws

    first, last = [1.0, 1.1, 1.4], [2.0, 2.3, 2.1]
    expected = stats.ttest_ind(last, first, equal_var=False).confidence_interval(0.95)
    told = str(Draws(("ddpo",), (*first, 9.0, 9.0, 9.0, *last)))
    assert f"[{expected.low:+.4g}, {expected.high:+.4g}]" in told


def test_draws_count_for_the_part_in_which_they_were_made():
    rows = [{"agsm/loss": 0.1}] * 2 + [{"ddpo/loss": 0.1, "ddpo/reward": float(n)} for n in range(FEWEST_DRAWS)]
    agsm, ddpo = phases(metrics(rows))
    assert not agsm.draws and ddpo.draws[0].rewards == tuple(map(float, range(FEWEST_DRAWS)))


def test_a_run_of_one_term_without_rewards_needs_no_words():
    assert story(phases(metrics(rows_of(["agsm"], ["agsm"]))), {0: {"strict": 0.3}, 2: {"strict": 0.5}}) == []


def drawn(*names, rewards, updates=1, **more):
    """Rows of terms that learn from one source, each draw for so many steps."""
    rows = []
    for place, value in enumerate(rewards):
        known = (("loss", 0.1), ("reward", value), ("x0_norm", 1.0 + place))
        figures = {f"{name}/{key}": of for name in names for key, of in known}
        rows += [figures | more] * updates
    return metrics(rows)


def test_a_draw_that_several_steps_learn_from_counts_once():
    (phase,) = phases(drawn("ddpo", rewards=range(8), updates=3))
    assert phase.draws[0].rewards == tuple(range(8))


def test_draws_of_one_worth_are_several():
    assert (
        phases(drawn("ddpo", rewards=[0.5] * 4 + [0.0] * 8, updates=2))[0].draws[0].rewards == (0.5,) * 4 + (0.0,) * 8
    )


def test_terms_that_share_their_draws_are_named_together():
    told = str(story(phases(drawn("ddpo", "diffusion_nft", rewards=range(6))), {}))
    assert told.count("the reward of") == 1 and "drawn for ddpo and diffusion_nft rose" in told


def test_steps_whose_gradient_was_not_applied_do_not_count():
    assert phases(drawn("ddpo", rewards=range(6), skipped=1.0)) == []
    assert phases(drawn("ddpo", rewards=range(6), **{"ddpo/skipped": 1.0})) == []


def test_a_part_lasts_until_the_next_one_begins_or_the_run_ends():
    rows = metrics([*rows_of(["a"], [], []), *rows_of(["b"], [])])
    found = phases(rows)
    assert [(phase.first, phase.last, phase.end) for phase in found] == [(1, 1, 3), (4, 4, 5)]
    scores = {0: {"x": 1.0}, 3: {"x": 2.0}, 5: {"x": 3.0}}
    told = story(found, scores, lambda begin, end: {"x": Interval(1.0, 0.5 + begin / 10, 1.2)})
    assert told == [
        "a learned in steps 1 to 1, with x 1 -> 2 (+1.00 [+0.50, +1.20])",
        "b learned in steps 4 to 4, with x 2 -> 3 (+1.00 [+0.80, +1.20])",
    ]


def test_other_figures_that_end_alike_are_no_rewards():
    rows = metrics([{"a/loss": 0.1, "b/loss": 0.1, "learning_rate/reward": float(n)} for n in range(9)])
    assert not phases(rows)[0].draws


def test_rewards_that_were_not_finite_are_left_out():
    rows = drawn("ddpo", rewards=[1.0, None, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert phases(rows)[0].draws[0].rewards == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
