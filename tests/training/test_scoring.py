"""Rewards in a run: what they return is checked, and failures are named with their place."""

import pytest
import torch
from agsm_rl_rewards.brightness import Brightness

from agsm_rl.errors import UserError
from agsm_rl.objectives.reward_backprop import RewardBackprop
from agsm_rl.training.scoring import WeightedReward, check_rewards, checked_score, weighted_scores


class Failing:
    """A reward with a bug."""

    name = "failing"
    range = (0.0, 1.0)
    differentiable = False

    def __init__(self, error):
        self.error = error

    def __call__(self, images, prompts):
        raise self.error


def test_an_exception_in_a_reward_is_told_with_its_name_and_its_line():
    with pytest.raises(UserError) as told:
        checked_score(Failing(KeyError("model")), torch.zeros(2, 3, 4, 4), ["a star", "b"], name="mine")
    assert "reward 'mine': it failed with KeyError: 'model' (in __call__, test_scoring.py line " in str(told.value)
    assert "2 images [3, 4, 4], the first for 'a star'" in str(told.value)
    assert isinstance(told.value.__cause__, KeyError)


def test_a_reward_s_own_message_to_the_user_is_left_as_it_is():
    with pytest.raises(UserError, match="^weights are missing$"):
        checked_score(Failing(UserError("weights are missing")), torch.zeros(1, 3, 4, 4), ["a"])


def test_a_reward_that_is_infinite_is_named_with_the_prompt_and_a_broken_image_is_not_blamed_on_it():
    class Infinite(Brightness):
        name = "big"

        def __call__(self, images, prompts):
            return torch.tensor([0.0, -torch.inf])

    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(UserError, match="reward 'big': its score is -inf for the prompt 'b'$"):
        checked_score(Infinite(), images, ["a", "b"])
    with pytest.raises(UserError, match="reward 'brightness': .*nan.*the image itself is not finite"):
        checked_score(Brightness(), images * torch.nan, ["a", "b"])


def test_weights_may_be_negative_and_zero():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rewards = [WeightedReward(Brightness(), -2.0, "dark"), WeightedReward(Brightness(), 0.0, "looked_at")]
    total, scores = weighted_scores(rewards, images, ["a"] * 3)
    torch.testing.assert_close(total, -2 * images.mean(dim=(1, 2, 3)))
    assert list(scores) == ["dark", "looked_at"]


def test_weights_that_are_all_zero_and_two_rewards_of_one_name_are_refused():
    with pytest.raises(UserError, match="all weights are 0, so nothing would be learned"):
        check_rewards([(Brightness(), 0.0)])
    with pytest.raises(UserError, match="two are called 'brightness'; rename one.*use: brightness"):
        check_rewards([(Brightness(), 1.0), (Brightness(), 2.0)])


def test_reward_backpropagation_refuses_a_normalised_reward():
    with pytest.raises(UserError, match="normalise 'z_score' is for rollouts.*leave it raw"):
        RewardBackprop([WeightedReward(Brightness(), 1.0, "brightness", "z_score")])


def test_a_reward_s_network_computes_in_its_own_precision_under_the_run_s_mixed_precision():
    weight = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))

    def network(images, prompts):
        return torch.nn.functional.linear(images.flatten(1), weight)[:, 0]

    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    rewards = check_rewards([(network, 1.0)])
    expected, _ = weighted_scores(rewards, images, ["a"] * 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images, []).dtype == torch.bfloat16
        found, _ = weighted_scores(rewards, images, ["a"] * 4)
    assert torch.equal(found, expected)


def test_a_function_of_either_form_is_a_reward_in_python_too():
    def red(images, prompts):
        return [float(image[0].mean()) for image in images]

    (one,) = check_rewards([(red, 2.0)])
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def long(prompts, completions, **columns):
        return [float(len(prompt)) for prompt in prompts]

    (trl,) = check_rewards([(long, 1.0)])
    assert checked_score(trl.reward, torch.zeros(2, 3, 4, 4), ["a", "bbb"]).tolist() == [1.0, 3.0]
    assert one.name == "red" and one.weight == 2.0
    torch.testing.assert_close(checked_score(one.reward, images, ["a", "b"]), images[:, 0].mean(dim=(1, 2)))


def test_a_registered_reward_goes_by_its_name_in_python_too():
    (reward,) = check_rewards({"brightness": 0.5})
    assert (reward.name, reward.weight) == ("brightness", 0.5)
    torch.testing.assert_close(checked_score(reward.reward, torch.ones(1, 3, 4, 4), ["x"]), torch.ones(1))
    with pytest.raises(UserError, match="'brightnes' is not a reward; .*Did you mean 'brightness'"):
        check_rewards({"brightnes": 1.0})


def test_a_reward_that_says_nothing_but_its_name_is_scored_here_and_has_no_gradient():
    class Plain:
        name = "plain"

        def __call__(self, images, prompts):
            return images.mean(dim=(1, 2, 3))

    (weighted,) = check_rewards([(Plain(), 1.0)])
    assert not weighted.reward.elsewhere and not weighted.reward.differentiable
    assert weighted.reward.range == (-float("inf"), float("inf"))
    with pytest.raises(UserError, match="'plain' has no gradient"):
        RewardBackprop([(Plain(), 1.0)])
