"""DDPO's loss against PPO's formula, its log-probability against a closed form, and ratio 1 on fresh rollouts."""

import math

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.objectives.ddpo import DDPO, clipped_policy_loss, step_log_prob
from agsm_rl.policy import Policy
from agsm_rl.training.sampling import gaussian_log_prob, guided


def test_the_log_probability_is_the_normal_density_averaged_over_elements():
    x, mean, std = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.tensor(0.3)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), expected)


def test_a_step_without_noise_leaves_nothing_to_chance():
    x = torch.randn(3, 4)
    assert gaussian_log_prob(x, x, torch.tensor(0.0)).tolist() == [0, 0, 0]


def test_the_loss_is_ppo_s_by_hand():
    old = torch.zeros(4)
    log_prob = torch.log(torch.tensor([1.3, 0.7, 1.3, 0.7]))
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, metrics = clipped_policy_loss(log_prob, old, advantages, clip_range=0.2)
    # A > 0: min(ρA, clip) → 1.2 and 0.7; A < 0: the worse of both → -1.3 and -0.8.
    assert loss.item() == pytest.approx(-(1.2 + 0.7 - 1.3 - 0.8) / 4)
    assert metrics["clip_fraction"].item() == 1
    assert metrics["ratio_deviation"].item() == pytest.approx(0.3)
    assert metrics["approximate_kl"].item() == pytest.approx((math.log(1.3) ** 2 + math.log(0.7) ** 2) / 4)


def test_at_ratio_one_the_gradient_is_that_of_the_policy_gradient():
    log_prob = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([0.5, -2.0, 1.0])
    loss, _ = clipped_policy_loss(log_prob, torch.zeros(3), advantages)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, -advantages / 3)


def test_the_clipped_side_gets_no_gradient():
    log_prob = torch.tensor([0.1], requires_grad=True)
    loss, _ = clipped_policy_loss(log_prob, torch.zeros(1), torch.ones(1), clip_range=1e-4)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert gradient.item() == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_fresh_rollouts_have_ratio_one(policy, rollouts, guidance):
    rollouts.guidance = guidance
    batch = rollouts.next(policy)
    _, metrics = DDPO().loss(policy, batch)
    assert metrics["ratio_deviation"].item() < 1e-5


@pytest.mark.parametrize("steps_per_pass", [1, 3])
def test_fresh_rollouts_have_ratio_one_on_each_kind_of_base(
    each_backbone, make_adapters, make_rollouts, steps_per_pass
):
    policy = Policy(each_backbone, make_adapters())
    batch = make_rollouts(bind=True, guidance=3.0).next(policy)
    for part, _ in DDPO(steps_per_pass=steps_per_pass).split(batch):
        assert DDPO().loss(policy, part)[1]["ratio_deviation"].item() < 1e-5


def test_steps_are_cut_into_passes_whose_shares_are_their_numbers(policy, rollouts):
    parts = DDPO(steps_per_pass=3, images_per_pass=2).split(rollouts.next(policy))
    assert [(part.steps, len(part), share) for part, share in parts] == [
        ((0, 1, 2), 2, 0.375),
        ((3,), 2, 0.125),
        ((0, 1, 2), 2, 0.375),
        ((3,), 2, 0.125),
    ]


def test_the_text_of_a_pass_is_encoded_once_for_all_its_steps(policy, rollouts, monkeypatch):
    batch, objective, asked = rollouts.next(policy), DDPO(images_per_pass=2), []
    encode = policy.backbone.encode_text
    monkeypatch.setattr(policy.backbone, "encode_text", lambda prompts: asked.append(prompts) or encode(prompts))
    for part, _ in objective.split(batch):
        objective.loss(policy, part)
    assert asked == [batch.prompts[:2], [""], batch.prompts[2:], [""]]


def test_changed_parameters_move_the_ratio_away_from_one(policy, rollouts):
    batch = rollouts.next(policy)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.5)
    _, metrics = DDPO().loss(policy, batch)
    assert metrics["ratio_deviation"].item() > 1e-4


def test_the_log_probability_of_a_step_is_that_of_ddim_in_closed_form(policy, rollouts):
    """DDIM (arXiv 2010.02502), eq. 12 and 16 with η = 1, computed here from the cumulative alphas."""
    batch, k = rollouts.next(policy), 1
    backbone = policy.backbone
    scheduler = backbone.pipeline.scheduler
    sampler = backbone.sampler(batch.num_steps)
    at = [int(t * 1000) for t in sampler.t]
    alpha, alpha_next = (scheduler.alphas_cumprod[at[k + offset]].double() for offset in (0, 1))
    x = batch.trajectory[:, k]
    with torch.no_grad():
        noise = policy.live(x, sampler.t[k].expand(len(x)), backbone.encode_text(batch.prompts)).double()
    x0 = (x.double() - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    std = ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
    mean = alpha_next.sqrt() * x0 + (1 - alpha_next - std**2).sqrt() * noise
    expected = torch.distributions.Normal(mean, std).log_prob(batch.trajectory[:, k + 1].double()).flatten(1).mean(1)
    with torch.no_grad():
        found = step_log_prob(policy, batch, k)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_learning_in_parts_gives_the_gradient_of_all_steps_at_once(policy, rollouts):
    batch = rollouts.next(policy)
    objective, parameters = DDPO(), list(policy.parameters().values())

    def gradient(parts):
        total = 0
        for part, share in parts:
            found = torch.autograd.grad(objective.loss(policy, part)[0] * share, parameters, allow_unused=True)
            total = total + torch.cat([value.flatten() for value in found if value is not None])
        return total

    whole = gradient([(batch, 1.0)])
    torch.testing.assert_close(gradient(objective.split(batch)), whole, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(gradient(DDPO(images_per_pass=3).split(batch)), whole, rtol=1e-3, atol=1e-7)


def test_a_fraction_of_the_steps_is_spread_over_the_path(policy, rollouts):
    parts = DDPO(timestep_fraction=0.5, timesteps="even").split(rollouts.next(policy))
    assert [part.steps for part, _ in parts] == [(0,), (3,)]
    assert sum(share for _, share in parts) == pytest.approx(1)


def test_guidance_of_one_is_the_conditional_prediction_alone():
    x, t = torch.randn(2, 1, 2, 2), torch.zeros(2)

    class Prompts:
        def __len__(self):
            return 2

    calls = []

    def predict(x_t, t, cond):
        calls.append(len(x_t))
        return x_t * 2

    assert torch.equal(guided(predict, x, t, Prompts(), Prompts(), 1.0), x * 2)
    assert calls == [2]


@pytest.mark.parametrize(
    "options",
    [
        {"clip_range": 0},
        {"timestep_fraction": 0},
        {"timestep_fraction": 1.5},
        {"images_per_pass": 0},
        {"steps_per_pass": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        DDPO(**options)


@pytest.mark.parametrize(
    ("fraction", "timesteps", "expected"),
    [(1.0, "first", [0, 1, 2, 3]), (0.5, "first", [0, 1]), (0.99, "first", [0, 1, 2]), (0.5, "even", [0, 3])],
)
def test_the_steps_learned_from_are_the_first_ones_or_evenly_spaced(policy, rollouts, fraction, timesteps, expected):
    batch = rollouts.next(policy)
    parts = DDPO(timestep_fraction=fraction, timesteps=timesteps).split(batch)
    assert [part.steps for part, _ in parts] == [(k,) for k in expected]
    assert sum(share for _, share in parts) == pytest.approx(1)


def test_one_step_at_least_is_learned_from(policy, make_rollouts):
    batch = make_rollouts(bind=True, sde_window={"size": 1, "range": [3, 4]}).next(policy)
    assert [part.steps for part, _ in DDPO(timestep_fraction=0.5).split(batch)] == [(3,)]
