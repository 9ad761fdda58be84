"""AWM, DGPO and CRD: their losses by hand and by independent code, and what their updates do to good and bad images."""

import math

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import RewardedBatch
from agsm_rl.objectives.awm import AWM, awm_loss, matching_log_prob
from agsm_rl.objectives.crd import CRD, crd_loss
from agsm_rl.objectives.dgpo import DGPO, dgpo_loss
from agsm_rl.objectives.forward_process import groups_of, matching_error
from agsm_rl.term import Term

ADVANTAGES = torch.tensor([1.5, -0.5, -1.0, 0.0, 2.0, -2.0])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def errors(seed=0):
    return torch.rand(6, generator=torch.Generator().manual_seed(seed)) + 0.1


def rewarded(policy, advantages, *, prompts=None):
    count = len(advantages)
    latents = torch.randn(count, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    values = torch.tensor(advantages)
    prompts = prompts or ["a red star"] * count
    return RewardedBatch(prompts, torch.arange(count), latents, rewards=values, advantages=values)


# AWM


def test_awm_at_the_old_policy_has_the_advantage_weighted_gradient():
    log_prob = (-errors()).requires_grad_()
    loss, metrics = awm_loss(log_prob, log_prob.detach(), ADVANTAGES, clip_range=1.0)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, -ADVANTAGES / 6)
    assert loss.item() == pytest.approx(-ADVANTAGES.mean().item())
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0


def test_awm_stops_where_the_ratio_has_passed_the_clip_in_the_advantages_direction():
    old = torch.zeros(4)
    log_prob = torch.tensor([1.2, 1.2, 0.6, 0.1]).log().requires_grad_()
    loss, metrics = awm_loss(log_prob, old, torch.tensor([1.0, -1.0, -1.0, 1.0]), clip_range=0.1)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.2, 0.0, -0.1]) / 4)
    assert metrics["clip_fraction"] == 1


@pytest.mark.parametrize(
    ("weighting", "by_hand"),
    [
        ("uniform", lambda error, t: -error),
        ("t", lambda error, t: -t * error),
        ("t_squared", lambda error, t: -t * t * error),
        ("ghuber", lambda error, t: -t * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25),
    ],
)
def test_awms_likelihoods_are_the_released_ones(weighting, by_hand):
    error, t = errors(), torch.linspace(0.1, 0.9, 6)
    wanted = torch.tensor([by_hand(e, level) for e, level in zip(error.tolist(), t.tolist(), strict=True)])
    torch.testing.assert_close(matching_log_prob(error, t, weighting=weighting, power=0.25), wanted)


def test_awm_as_released_adds_both_distances_and_compares_with_itself(policy, move):
    move(policy)
    batch = rewarded(policy, [1.0, -0.5, 9.0])
    loss, metrics = AWM(kl_weight=0.003, ema_kl_weight=1.0).loss(policy, batch)
    seen = policy.noised(batch)
    live = policy.live(seen.x_t, seen.t, seen.cond)
    base, ema = (one(seen.x_t, seen.t, seen.cond) for one in (policy.reference, policy.ema))
    scaled = torch.tensor([0.2, -0.1, 1.0])
    wanted = -scaled.mean() + 0.003 * ((live - base) ** 2).mean() + ((live - ema) ** 2).mean()
    torch.testing.assert_close(loss, wanted)
    assert metrics["ratio"] == 1
    assert metrics["reference_gap"] > 0 and metrics["ema_gap"] > 0


def test_awm_compares_with_the_old_policy_where_it_is_asked_to(policy, move):
    objective = AWM(old={"decay": 0.0, "every": "draw"}, kl_weight=0.0, ema_kl_weight=0.0)
    policy.keep_old("awm")
    policy.acting_for = "awm"
    move(policy)
    batch = rewarded(policy, [1.0, -0.5])
    _, metrics = objective.loss(policy, batch)
    assert metrics["ratio_deviation"] > 0


# DGPO


def test_dgpo_is_a_sigmoid_of_each_groups_weighted_gain():
    error, reference, beta = errors(0), errors(1), 7.0
    loss, metrics = dgpo_loss(error, reference, ADVANTAGES, GROUP, beta=beta)
    losses = []
    for rows in ([0, 1, 2], [3, 4, 5]):
        gain = sum(float(ADVANTAGES[i] * (reference[i] - error[i])) for i in rows) / 3
        losses.append(math.log1p(math.exp(-beta * gain)) / beta)
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert metrics["error_change"] == pytest.approx((error - reference).mean().item())


def test_dgpos_gradient_is_the_released_surrogates():
    """The released code weighs A·ℓ by σ of the group's sum of β·A·(ℓ − ℓ_ref)/G, held constant."""
    error, reference, beta = errors(0).requires_grad_(), errors(1), 100.0
    loss, _ = dgpo_loss(error, reference, ADVANTAGES, GROUP, beta=beta)
    (gradient,) = torch.autograd.grad(loss, error)
    terms = ADVANTAGES * beta * (error.detach() - reference) / 3
    weight = torch.sigmoid(torch.zeros(2).scatter_add_(0, GROUP, terms))[GROUP]
    surrogate = (weight * ADVANTAGES * error).mean()
    (wanted,) = torch.autograd.grad(surrogate, error)
    torch.testing.assert_close(gradient, wanted)


def test_dgpo_stops_an_image_that_has_gone_far_enough(policy, move):
    objective = DGPO(clip_range=1e-9, kl_weight=0.0)
    policy.keep_old("dgpo")
    policy.acting_for = "dgpo"
    move(policy)
    batch = rewarded(policy, [1.0, -1.0, 0.5, -0.5])
    loss, metrics = objective.loss(policy, batch)
    seen = objective.noised(policy, objective.split(batch)[0][0])
    old = matching_error(policy.old(seen.x_t, seen.t, seen.cond), seen.target)
    live = matching_error(policy.live(seen.x_t, seen.t, seen.cond), seen.target).detach()
    better = old > live
    gone = torch.where(batch.advantages > 0, better, ~better)
    assert metrics["clip_fraction"] == pytest.approx(gone.float().mean().item())
    assert torch.isfinite(loss)


# CRD


def test_crd_is_the_squared_gap_of_the_centred_rewards():
    implicit, reward, beta = errors(0), torch.tensor([0.1, 0.5, 0.9, 0.2, 0.2, 0.8]), 2.0
    loss, metrics = crd_loss(implicit, reward, GROUP, beta=beta)
    total = 0.0
    for rows in ([0, 1, 2], [3, 4, 5]):
        rho, r = implicit[rows] - implicit[rows].mean(), reward[rows] - reward[rows].mean()
        total += float(((beta * rho - r) ** 2).sum())
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    assert -1 <= metrics["agreement"] <= 1


def test_crd_is_at_its_minimum_where_implicit_rewards_are_true_up_to_a_constant_of_each_prompt():
    reward = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.2, 0.8])
    implicit = (reward / 2 + torch.tensor([3.0] * 3 + [-1.0] * 3)).requires_grad_()
    loss, metrics = crd_loss(implicit, reward, GROUP, beta=2.0)
    (gradient,) = torch.autograd.grad(loss, implicit)
    assert loss.item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(gradient, torch.zeros(6), atol=1e-6, rtol=0)
    assert metrics["agreement"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("form", ["mse", "bce"])
def test_crds_temperature_centres_on_the_best_and_on_the_worst_images(form):
    """Flow-Factory's two directions, for one prompt, derived anew."""
    implicit, reward, heat = errors(0), torch.tensor([0.1, 0.5, 0.9, 0.2, 0.2, 0.8]), 0.3
    loss, _ = crd_loss(implicit, reward, torch.zeros(6, dtype=torch.long), temperature=heat, form=form)
    parts = []
    for sign in (1, -1):
        weight = torch.softmax(sign * reward / heat, dim=0)
        rho, r = implicit - (weight * implicit).sum(), reward - (weight * reward).sum()
        squared = ((rho - r) ** 2).mean()
        p = torch.sigmoid(r)
        crossed = -(p * torch.sigmoid(rho).log() + (1 - p) * torch.sigmoid(-rho).log()).mean()
        parts.append(squared if form == "mse" else crossed)
    torch.testing.assert_close(loss, (parts[0] + parts[1]) / 2)


def test_crds_temperature_may_be_sharp_where_one_prompt_is_far_better_than_another():
    reward = torch.tensor([0.9, 0.8, 1.0, 0.1, 0.0, 0.2])
    loss, _ = crd_loss(errors(0), reward, GROUP, temperature=1e-3)
    picked = [
        crd_loss(errors(0)[rows], reward[rows], GROUP[:3], temperature=1e-3)[0] for rows in (GROUP == 0, GROUP == 1)
    ]
    torch.testing.assert_close(loss, sum(picked) / 2)
    assert loss.isfinite()


def test_crd_weighs_the_distance_from_the_guided_base_by_the_reward(policy, move):
    move(policy)
    batch = rewarded(policy, [5.0, -5.0])
    options = {"scaled": False, "kl_guidance": 3.0}
    without, _ = CRD(kl_weight=0.0, **options).loss(policy, batch)
    loss, _ = CRD(kl_weight=0.1, **options).loss(policy, batch)
    objective = CRD(**options)
    seen = objective.noised(policy, objective.split(batch)[0][0])
    uncond = policy.backbone.encode_text([""]).expand(2)
    with_prompt = policy.reference(seen.x_t, seen.t, seen.cond)
    empty = policy.reference(seen.x_t, seen.t, uncond)
    live = policy.live(seen.x_t, seen.t, seen.cond)
    gap = ((live - (empty + 3.0 * (with_prompt - empty))) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss - without, (torch.tensor([0.1, 1e-4]) * gap).mean(), rtol=1e-3, atol=1e-6)


# What they share


@pytest.mark.parametrize("objective", [DGPO, CRD])
def test_images_of_one_prompt_share_noise_and_noise_level(policy, objective):
    batch = rewarded(policy, [1.0, -1.0, 1.0, -1.0], prompts=["a red star", "a blue circle"] * 2)
    batch = RewardedBatch(
        batch.prompts, batch.rows, torch.zeros_like(batch.latents), rewards=batch.rewards, advantages=batch.advantages
    )
    one = objective()
    (part, share), *_ = one.split(batch)
    assert share == 1
    seen = one.noised(policy, part)
    same = groups_of(part.batch)
    for number in (0, 1):
        first, second = seen.x_t[same == number]
        assert torch.equal(first, second)
    assert len(set(seen.t.tolist())) == 2


@pytest.mark.parametrize("objective", [DGPO, CRD])
def test_a_pass_holds_whole_prompts_or_is_refused(policy, objective):
    batch = rewarded(policy, [1.0, -1.0] * 4, prompts=["a red star"] * 4 + ["a blue circle"] * 4)
    parts = objective(rows_per_pass=5).split(batch)
    assert [(part.batch.prompts, share) for part, share in parts] == [
        (["a red star"] * 4, 0.5),
        (["a blue circle"] * 4, 0.5),
    ]
    with pytest.raises(UserError, match="rows_per_pass: got 3, but a step learns from 4 images of one prompt"):
        objective(rows_per_pass=3).split(batch)


@pytest.mark.parametrize("objective", [DGPO, CRD])
def test_passes_have_the_gradient_of_all_groups_at_once_whatever_their_sizes(policy, objective, move):
    move(policy)
    batch = rewarded(policy, [2.0, -1.0, -1.0, 1.0, -1.0], prompts=["a red star"] * 3 + ["a blue circle"] * 2)

    def gradient(one):
        total = sum(share * one.loss(policy, part)[0] for part, share in one.split(batch))
        found = torch.autograd.grad(total, list(policy.parameters().values()), allow_unused=True)
        return [value for value in found if value is not None]

    for all_at_once, in_passes in zip(gradient(objective()), gradient(objective(rows_per_pass=3)), strict=True):
        torch.testing.assert_close(in_passes, all_at_once, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("objective", [DGPO, CRD])
def test_rollouts_without_several_images_of_a_prompt_in_a_pass_are_refused(make_rollouts, objective):
    with pytest.raises(UserError, match="dgpo: source: a step has at most one image per prompt .*at least 4"):
        Term(objective(), make_rollouts(updates=2), name="dgpo")
    with pytest.raises(UserError, match="rows_per_pass is 1, but a step learns from 2 images of one prompt"):
        Term(objective(rows_per_pass=1), make_rollouts())
    Term(objective(rows_per_pass=2), make_rollouts(images_per_prompt=4, updates=2))


@pytest.mark.parametrize("objective", [DGPO, CRD])
def test_a_prompt_that_is_drawn_twice_is_two_groups(policy, make_rollouts, objective):
    """At the end of an epoch, and with fewer prompts than a draw has; processes that share a draw see the same."""
    batch = make_rollouts(bind=True, num_prompts=4).next(policy)
    assert len(set(batch.prompts)) == 3
    assert groups_of(batch).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [len(part) for part, _ in objective(rows_per_pass=2).split(batch)] == [2, 2, 2, 2]
    seen = objective().noised(policy, objective().split(batch)[0][0])
    assert len(set(seen.t.tolist())) == 4


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: AWM(clip_range=0), "clip_range"),
        (lambda: AWM(weighting="huber"), "weighting"),
        (lambda: AWM(huber_power=2.0), "huber_power"),
        (lambda: AWM(ema_kl_weight=-1), "ema_kl_weight"),
        (lambda: DGPO(beta=0), "beta"),
        (lambda: DGPO(reference="ema"), "reference"),
        (lambda: DGPO(kl_weight=-1), "kl_weight"),
        (lambda: CRD(temperature=0), "temperature"),
        (lambda: CRD(form="l1"), "form"),
        (lambda: CRD(advantage_scale=-5), "advantage_scale"),
    ],
)
def test_options_out_of_range_are_named(make, name):
    with pytest.raises(UserError, match=name):
        make()


@pytest.mark.parametrize("objective", [AWM, DGPO, CRD])
def test_an_update_favours_the_good_image_over_the_bad_one(policy, objective):
    """After some steps on fixed noise, the good image's matching error has fallen against the bad one's."""
    batch = rewarded(policy, [2.0, -2.0])
    one = objective(kl_weight=0.0)
    seen = one.noised(policy, one.split(batch)[0][0])

    def lead():
        error = matching_error(policy.live(seen.x_t, seen.t, seen.cond), seen.target)
        return float((error[1] - error[0]).detach())

    before = lead()
    optimizer = torch.optim.SGD(list(policy.parameters().values()), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        one.loss(policy, batch)[0].backward()
        optimizer.step()
    assert lead() > before
