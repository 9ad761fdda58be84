"""What a reward of the user's may do to a run: neither change what others see, nor end it as if it had succeeded."""

import pytest
import torch
from agsm_rl_rewards.functions import as_reward

from agsm_rl.errors import UserError
from agsm_rl.training.scoring import InParts, checked_score, scores_of, weighted_scores
from agsm_rl.training.scoring import WeightedReward as Weighted


def spoiling(images, prompts):
    images.sub_(0.5).mul_(0)
    prompts.reverse()
    return torch.zeros(len(images))


def spoiling_as_numpy(images, prompts):
    images.detach().numpy()[:] = 0
    return [0.0] * len(prompts)


def mean(images, prompts):
    return images.mean(dim=(1, 2, 3))


mean.differentiable = True
PROMPTS = ["a", "b"]


@pytest.mark.parametrize("bad", [spoiling, spoiling_as_numpy])
def test_what_a_reward_does_to_its_images_reaches_nobody_else(bad):
    images = torch.rand(2, 3, 4, 4)
    before, prompts = images.clone(), list(PROMPTS)
    rewards = [Weighted(as_reward(bad), 1.0, "bad"), Weighted(as_reward(mean), 1.0, "good")]
    assert torch.equal(scores_of(rewards, images, prompts)["good"], mean(before, prompts))
    with InParts(rewards) as scoring:
        scoring.add(images, prompts)
        assert torch.equal(scoring.scores()["good"], mean(before, prompts))
    assert torch.equal(images, before) and prompts == PROMPTS


def test_rewards_with_gradients_keep_them_beside_one_that_changes_its_images():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    rewards = [Weighted(as_reward(spoiling), 1.0, "bad"), Weighted(as_reward(mean), 1.0, "good")]
    total, _ = weighted_scores(rewards, images * 1.0, list(PROMPTS))
    total.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 48))


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (SystemExit(0), r"reward 'bad': it called sys.exit\(0\)"),
        (SystemExit("done"), r"reward 'bad': it called sys.exit\('done'\)"),
        (Odd("stop"), r"reward 'bad': it failed with Odd: stop \(in bad, test_user_code.py line \d+\), on 2 images"),
        (StopIteration(), "it failed with StopIteration"),
    ],
)
def test_a_reward_that_ends_the_process_is_a_failing_reward(raised, message):
    def bad(images, prompts):
        raise raised

    with pytest.raises(UserError, match=message):
        checked_score(as_reward(bad), torch.rand(2, 3, 4, 4), PROMPTS)


def test_gradients_that_a_reward_switches_off_are_on_again():
    def bad(images, prompts):
        torch.set_grad_enabled(False)
        return [0.0, 0.0]

    checked_score(as_reward(bad), torch.rand(2, 3, 4, 4), PROMPTS)
    assert torch.is_grad_enabled()
