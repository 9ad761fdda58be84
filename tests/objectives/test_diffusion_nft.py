"""DiffusionNFT: its loss by hand, what good and bad images pull at, and one update that moves both as it should."""

import json
from pathlib import Path

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import RewardedBatch
from agsm_rl.objectives.diffusion_nft import DiffusionNFT, nft_loss
from agsm_rl.objectives.forward_process import optimality
from agsm_rl.training.randomness import Draw


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


GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusion_nft.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"beta {case['beta']}")
def test_loss_and_gradient_are_the_authors(case):
    x0, noise, old, t = (torch.tensor(GOLDEN[name]) for name in ("x0", "noise", "old", "t"))
    live, beta = torch.tensor(case["live"]).requires_grad_(), case["beta"]
    reward = optimality(torch.tensor(GOLDEN["advantages"]), 5.0)
    loss, _ = nft_loss(live, old, noise - x0, reward, beta=beta, adaptive=True, t=t)
    (gradient,) = torch.autograd.grad(5 / beta * loss, live)
    assert 5 / beta * loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor(case["gradient"]), rtol=1e-4, atol=1e-6)


def test_by_default_the_objective_is_as_released(policy):
    batch = rewarded(policy, [1.0, -0.5, 6.0])
    loss, metrics = DiffusionNFT(beta=0.5).loss(policy, batch)
    x_t, t, target, cond = policy.noised(batch)
    live, old = policy.live(x_t, t, cond), policy.ema(x_t, t, cond)
    bare, _ = nft_loss(live, old, target, torch.tensor([0.6, 0.45, 1.0]), beta=0.5, adaptive=True, t=t)
    torch.testing.assert_close(loss, 10 * bare)
    assert metrics["optimality"] == pytest.approx((0.6 + 0.45 + 1.0) / 3)


def test_the_weight_of_the_distance_from_the_base_is_added_to_the_loss(policy):
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.1)
    batch = rewarded(policy, [1.0, -0.5])
    without, _ = DiffusionNFT().loss(policy, batch)
    loss, metrics = DiffusionNFT(kl_weight=0.5).loss(policy, batch)
    assert metrics["reference_gap"] > 0
    torch.testing.assert_close(loss, without + 0.5 * metrics["reference_gap"])


def levels_seen(policy, objective, batch):
    """Each part's noise levels [B] and noisy latents."""
    return [objective.noised(policy, part) for part, _ in objective.split(batch)]


@pytest.mark.parametrize("sampler_steps", [None, 10])
def test_an_image_is_learned_at_several_levels_each_with_its_own_noise(policy, sampler_steps):
    batch = rewarded(policy, [1.0, -0.5, 0.0])
    objective = DiffusionNFT(sampler_steps=sampler_steps, levels_per_image=4)
    parts = objective.split(batch)
    assert [share for _, share in parts] == [0.25] * 4
    seen = levels_seen(policy, objective, batch)
    levels = torch.stack([noised.t for noised in seen])
    for column in levels.T.tolist():
        assert len(set(column)) == 4
    assert len(set(map(tuple, levels.T.tolist()))) == 3
    if sampler_steps:
        assert set(levels.flatten().tolist()) <= set(policy.backbone.sampler(10).t.tolist())
    noises = [noised.target for noised in seen]
    assert not torch.equal(noises[0], noises[1])


def test_of_the_samplers_levels_only_those_in_the_terms_range_are_taken(policy):
    policy.draw = Draw(0, "nft", 0, t_range=(0.5, 1.0))
    batch = rewarded(policy, [1.0, -0.5])
    for noised in levels_seen(policy, DiffusionNFT(sampler_steps=10, levels_per_image=5), batch):
        assert (noised.t >= 0.5).all()
    with pytest.raises(UserError, match="5 of the sampler's 10 noise levels lie in the term's t"):
        levels_seen(policy, DiffusionNFT(sampler_steps=10, levels_per_image=9), batch)


def test_one_uniform_level_per_image_is_drawn_as_before(policy):
    batch = rewarded(policy, [1.0, -0.5])
    (seen,) = levels_seen(policy, DiffusionNFT(), batch)
    wanted = policy.noised(batch)
    assert torch.equal(seen.t, wanted.t) and torch.equal(seen.x_t, wanted.x_t)


def test_advantages_become_rewards_between_nought_and_one():
    reward = optimality(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]), 2.0)
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


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"advantage_scale": -1.0},
        {"rows_per_pass": 0},
        {"kl_weight": -1.0},
        {"sampler_steps": 0},
        {"levels_per_image": 0},
        {"levels_per_image": 11, "sampler_steps": 10},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        DiffusionNFT(**options)
