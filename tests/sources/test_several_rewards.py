"""Several rewards on one draw: each in its own unit or normalised by itself, logged apart, continued exactly."""

import numpy as np
import pytest
import torch
from agsm_rl_rewards.brightness import Brightness
from agsm_rl_rewards.sharpness import Sharpness

from agsm_rl.errors import UserError
from agsm_rl.training.scoring import WeightedReward

PROMPTS = ["a", "b", "a", "b", "c", "a", "b", "c", "c"]
SCORES = {
    "first": torch.tensor([1.0, 10.0, 3.0, 20.0, 7.0, 2.0, 40.0, 7.0, 7.0]),
    "second": torch.tensor([100.0, 300.0, 200.0, 100.0, 500.0, 400.0, 100.0, 800.0, 100.0]),
}


def rewards(first="z_score", second="z_score", weights=(1.0, 0.5)):
    return [
        WeightedReward(Brightness(), weights[0], "first", first),
        WeightedReward(Sharpness(), weights[1], "second", second),
    ]


def z_by_prompt(values, eps):
    values, found = values.double().numpy(), np.zeros(len(values))
    for prompt in set(PROMPTS):
        rows = [row for row, other in enumerate(PROMPTS) if other == prompt]
        found[rows] = (values[rows] - values[rows].mean()) / (values[rows].std() + eps)
    return found


def test_normalised_rewards_by_group_are_gdpo(make_rollouts):
    """arXiv 2601.05242: each reward by group, their weighted sum, and that over the whole draw."""
    source = make_rollouts(bind=True, advantages="group", rewards=rewards(weights=(1.0, -0.5)))
    worth, advantages = source._worth(SCORES, PROMPTS)
    expected = z_by_prompt(SCORES["first"], 1e-4) - 0.5 * z_by_prompt(SCORES["second"], 1e-4)
    np.testing.assert_allclose(worth.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        advantages.numpy(), (expected - expected.mean()) / (expected.std() + 1e-4), rtol=1e-4, atol=1e-5
    )


def test_a_normalised_reward_counts_the_same_in_any_unit(make_rollouts):
    source = make_rollouts(bind=True, advantages="group", rewards=rewards())
    worth, advantages = source._worth(SCORES, PROMPTS)
    scaled, again = source._worth({"first": SCORES["first"], "second": 1e3 * SCORES["second"] - 7}, PROMPTS)
    torch.testing.assert_close(worth, scaled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(advantages, again, rtol=1e-4, atol=1e-4)


def test_by_history_a_reward_is_normalised_by_its_own_past(make_rollouts):
    source = make_rollouts(bind=True, min_history=2, rewards=rewards("raw", "z_score"))
    past = {"first": torch.tensor([1.0, 2.0]), "second": torch.tensor([0.0, 100.0])}
    source._worth(past, ["a", "a"])
    worth, _ = source._worth({"first": torch.tensor([5.0]), "second": torch.tensor([200.0])}, ["a"])
    history = np.array([0.0, 100.0, 200.0])
    assert worth.item() == pytest.approx(5 + 0.5 * (200 - history.mean()) / history.std(), rel=1e-4)


def test_raw_rewards_are_summed_in_their_own_units_as_before(make_rollouts):
    raw, one = make_rollouts(bind=True, rewards=rewards("raw", "raw")), make_rollouts(bind=True)
    worth, advantages = raw._worth(SCORES, PROMPTS)
    torch.testing.assert_close(worth, SCORES["first"] + 0.5 * SCORES["second"])
    assert torch.equal(advantages, one._advantages(worth, PROMPTS))


def test_each_reward_is_logged_in_its_own_unit_and_the_sum_beside_them(policy, make_rollouts):
    source = make_rollouts(bind=True, rewards=rewards("z_score", "raw", weights=(1.0, -2.0)))
    source.next(policy)
    found = source.metrics()
    assert found["reward"] == pytest.approx(found["reward/first"] - 2 * found["reward/second"], rel=1e-5)
    assert found["reward_std/first"] > 0
    assert found["zero_variance"] == 0
    assert found["x0_norm"] > 0


def test_rewards_of_weight_zero_are_logged_and_teach_nothing(make_rollouts):
    alone = make_rollouts(bind=True, advantages="group", rewards=rewards()[:1])
    both = make_rollouts(bind=True, advantages="group", rewards=rewards(second="raw", weights=(1.0, 0.0)))
    _, expected = alone._worth({"first": SCORES["first"]}, PROMPTS)
    _, found = both._worth(SCORES, PROMPTS)
    assert torch.equal(expected, found)
    assert both.metrics()["reward/second"] == pytest.approx(float(SCORES["second"].mean()))


@pytest.mark.parametrize("advantages", ["group", "history"])
@pytest.mark.parametrize("normalise", ["raw", "z_score"])
def test_rewards_that_are_all_equal_teach_exactly_nothing(make_rollouts, advantages, normalise):
    """0.1 and 0.7 have no exact mean in floating point: what rounding leaves must not be divided up to size."""
    source = make_rollouts(bind=True, min_history=2, advantages=advantages, rewards=rewards(normalise, normalise))
    scores = {"first": torch.full((9,), 0.1), "second": torch.full((9,), 0.7)}
    for _ in range(2):
        _, found = source._worth(scores, PROMPTS)
    assert found.abs().max() == 0
    assert source.metrics()["zero_variance"] == 1
    assert source.metrics()["reward_std/first"] == source.metrics()["reward_std/second"] == 0


def test_the_statistics_of_normalised_rewards_are_continued_exactly(policy, make_rollouts, tmp_path):
    def make():
        return make_rollouts(bind=True, min_history=2, updates=2, rewards=rewards())

    source = make()
    for _ in range(3):
        source.next(policy)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    expected = [source.next(policy) for _ in range(3)]
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in expected:
        again = other.next(policy)
        assert torch.equal(batch.rewards, again.rewards)
        assert torch.equal(batch.advantages, again.advantages)
    assert other.state_dict()["own_histories"] == source.state_dict()["own_histories"]
    assert set(other.state_dict()["own_histories"]) == {"first", "second"}


class Share:
    """One of two processes; `gather` puts the other's rows, which are known, in their place."""

    count = 2

    def __init__(self, index, others):
        self.index, self.others = index, iter(others)

    def gather(self, values):
        other = next(self.others)
        return torch.cat([values, other] if self.index == 0 else [other, values])


def test_an_image_s_advantage_is_the_same_whichever_process_drew_it(policy, make_rollouts):
    whole = make_rollouts(bind=True, advantages="group", rewards=rewards())
    gathered = []
    gather = whole._shard.gather
    whole._shard.gather = lambda values: gathered.append(gather(values)) or values
    expected = whole.next(policy)
    for index, rows in ((0, slice(0, 2)), (1, slice(2, 4))):
        others = [values[slice(2, 4) if index == 0 else slice(0, 2)] for values in gathered]
        part = make_rollouts(advantages="group", rewards=rewards())
        part.bind("ddpo", 0, Share(index, others))
        found = part.next(policy)
        torch.testing.assert_close(found.advantages, expected.advantages[rows], rtol=1e-3, atol=1e-3)
        assert part.metrics() == pytest.approx(whole.metrics(), rel=1e-4)


def test_images_that_are_not_finite_are_told_before_any_reward_sees_them(policy, make_rollouts):
    source, fresh = make_rollouts(bind=True), make_rollouts(bind=True)
    source.next(policy)
    with torch.no_grad():
        next(iter(policy.parameters().values())).fill_(float("nan"))
    with pytest.raises(UserError, match="ddpo: 4 of the 4 images drawn are not finite.*have diverged.*start_from"):
        source.next(policy)
    with pytest.raises(UserError, match="nothing has been trained yet, so the cause is the base"):
        fresh.next(policy)
