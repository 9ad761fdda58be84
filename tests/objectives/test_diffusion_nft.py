"""DiffusionNFT: its loss by hand, what good and bad images pull at, and one update that moves both as it should."""

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import RewardedBatch
from agsm_rl.objectives.diffusion_nft import DiffusionNFT, nft_loss


def tensors(*, count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 2, 4, 4, generator=generator) for _ in range(3)]


def test_the_loss_is_the_papers_by_hand():
    live, old, target = tensors()
    reward, beta = torch.tensor([1.0, 0.0, 0.3]), 0.4
    total = 0.0
    for row, r in enumerate(reward.tolist()):
        positive = (1 - beta) * old[row] + beta * live[row]
        negative = (1 + beta) * old[row] - beta * live[row]
        total += r * ((positive - target[row]) ** 2).mean() + (1 - r) * ((negative - target[row]) ** 2).mean()
    loss, _ = nft_loss(live, old, target, reward, beta=beta)
    assert loss.item() == pytest.approx(float(total) / 3, rel=1e-5)


def test_at_the_old_policy_the_loss_is_its_error_and_the_reward_turns_the_gradient():
    _, old, target = tensors()
    live = old.clone().requires_grad_()
    reward, beta = torch.tensor([1.0, 0.5, 0.0]), 0.7
    loss, metrics = nft_loss(live, old, target, reward, beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(((old - target) ** 2).mean().item(), rel=1e-5)
    towards = 2 * beta * (old - target) / old.numel()
    torch.testing.assert_close(live.grad[0], towards[0])
    torch.testing.assert_close(live.grad[1], torch.zeros_like(towards[1]))
    torch.testing.assert_close(live.grad[2], -towards[2])
    assert metrics["old_gap"] == 0


def test_only_the_live_prediction_gets_a_gradient():
    live, old, target = (value.requires_grad_() for value in tensors())
    loss, _ = nft_loss(live, old, target, torch.tensor([1.0, 0.0, 0.5]))
    loss.backward()
    assert live.grad is not None
    assert old.grad is None
    assert target.grad is None


def test_the_adaptive_weight_makes_an_images_gradient_independent_of_its_errors_size():
    def gradient(scale):
        live = torch.full((1, 1, 2, 2), scale, requires_grad=True)
        zero = torch.zeros(1, 1, 2, 2)
        loss, _ = nft_loss(live, zero, zero, torch.ones(1), beta=1.0, adaptive=True)
        return torch.autograd.grad(loss, live)[0]

    torch.testing.assert_close(gradient(0.1), gradient(10.0))


def rewarded(policy, advantages):
    count = len(advantages)
    latents = torch.randn(count, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    values = torch.tensor(advantages)
    return RewardedBatch(["a red star"] * count, torch.arange(count), latents, rewards=values, advantages=values)


def test_advantages_become_rewards_between_nought_and_one():
    reward = DiffusionNFT(advantage_scale=2.0).reward(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]))
    assert reward.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("advantage", "sign"), [(1.0, -1), (-1.0, 1)])
def test_a_step_fits_a_good_image_better_and_a_bad_one_worse(make_policy, advantage, sign):
    policy, objective = make_policy(), DiffusionNFT()
    batch = rewarded(policy, [advantage] * 4)
    parameters = list(policy.parameters().values())
    loss, before = objective.loss(policy, batch)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if gradient is not None:
            parameter.data -= 0.5 * gradient
    with torch.no_grad():
        _, after = objective.loss(policy, batch)
    assert sign * (after["positive_error"] - before["positive_error"]) > 0


def test_images_as_good_as_their_prompts_others_teach_nothing_at_first(policy):
    loss, _ = DiffusionNFT().loss(policy, rewarded(policy, [0.0, 0.0]))
    parameters = list(policy.parameters().values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert max(float(value.abs().max()) for value in found if value is not None) < 1e-7


def test_fewer_rows_at_once_give_the_same_gradient(policy):
    batch, parameters = rewarded(policy, [1.0, -0.5, 0.2, 0.9]), list(policy.parameters().values())

    def gradient(objective):
        total = 0
        for part, share in objective.split(batch):
            found = torch.autograd.grad(objective.loss(policy, part)[0] * share, parameters, allow_unused=True)
            total = total + torch.cat([value.flatten() for value in found if value is not None])
        return total

    whole, parts = gradient(DiffusionNFT()), gradient(DiffusionNFT(rows_per_pass=3))
    assert whole.abs().sum() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"advantage_scale": -1.0}, {"rows_per_pass": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        DiffusionNFT(**options)
