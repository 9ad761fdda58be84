"""GRPO-Guard and Flow-DPPO: their losses by hand, and rollouts that keep the means that they compare with."""

from dataclasses import replace

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.objectives.flow_dppo import FlowDPPO, masked_policy_loss
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.objectives.grpo_guard import GRPOGuard, guarded_log_ratio
from agsm_rl.objectives.policy_gradient import rollout_steps
from agsm_rl.term import Term


def gaussian(x, mean, std):
    """log N(x; mean, std²) up to a constant, averaged over the elements of each row, [B]."""
    return (-((x - mean) ** 2) / (2 * std**2)).flatten(1).mean(1)


def test_the_guarded_log_ratio_is_the_noise_times_the_means_distance():
    """x = μ_old + σ·ε, so that σ·(log π − log π_old + ‖Δμ‖²/2σ²) is the mean of ε·Δμ, whatever σ."""
    generator = torch.Generator().manual_seed(0)
    old, new, noise = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3))
    std = torch.tensor([0.05])
    x = old + std * noise
    ratio = guarded_log_ratio(
        gaussian(x, new, std)[:, None],
        gaussian(x, old, std)[:, None],
        ((new - old) ** 2).flatten(1).mean(1)[:, None],
        std,
    )
    torch.testing.assert_close(ratio[:, 0], (noise * (new - old)).flatten(1).mean(1), rtol=1e-3, atol=1e-4)


def test_flow_dppo_masks_only_steps_beyond_the_threshold_that_lead_away():
    log_prob = torch.tensor([[0.1, 0.1, -0.1, -0.1, 0.1]]).requires_grad_()
    divergence = torch.tensor([[1.0, 1e-9, 1.0, 1.0, 1.0]])
    for sign, kept in ((1.0, [0, 1, 1, 1, 0]), (-1.0, [1, 1, 0, 0, 1])):
        advantages = torch.tensor([[sign]])
        loss, metrics = masked_policy_loss(log_prob, torch.zeros(1, 5), advantages, divergence, threshold=1e-5)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        wanted = -sign * log_prob.detach().exp() / 5 * torch.tensor([kept])
        torch.testing.assert_close(gradient, wanted)
        assert metrics["clip_fraction"] == pytest.approx(1 - sum(kept) / 5)


def test_flow_dppo_masks_a_ratio_that_has_overflowed_without_a_nan():
    log_prob = torch.tensor([[200.0]]).requires_grad_()
    loss, _ = masked_policy_loss(log_prob, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), threshold=1e-5)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert loss == 0 and gradient == 0


@pytest.fixture
def kept(policy, make_rollouts):
    """A draw of the policy with the means of its steps."""
    return make_rollouts(bind=True, keep_means=True).next(policy)


def test_rollouts_keep_the_means_that_their_steps_were_drawn_with(policy, kept):
    again = [mean for mean, _ in rollout_steps(policy, policy.live, kept)]
    for k, mean in zip(kept.steps, again, strict=True):
        torch.testing.assert_close(kept.means[:, k], mean, rtol=0, atol=1e-5)


def test_shares_of_a_draw_keep_their_own_means(policy, make_rollouts):
    whole = make_rollouts(bind=True, keep_means=True).next(policy)
    source = make_rollouts(bind=True, keep_means=True, updates=2)
    for part in (source.next(policy), source.next(policy)):
        assert torch.equal(part.means, whole.means[part.rows])


@pytest.mark.parametrize("objective", [GRPOGuard, FlowDPPO])
def test_rollouts_without_kept_means_are_refused_before_anything_is_drawn(make_rollouts, objective):
    with pytest.raises(UserError, match="guard: source: this objective .* add `keep_means: true` to its rollouts"):
        Term(objective(), make_rollouts(), name="guard")
    Term(objective(), make_rollouts(keep_means=True))


def test_without_kept_means_the_message_says_what_to_add(policy, make_rollouts):
    batch = make_rollouts(bind=True).next(policy)
    for objective in (GRPOGuard(), FlowDPPO()):
        with pytest.raises(UserError, match="add `keep_means: true` to its rollouts"):
            objective.loss(policy, batch)


def test_means_are_not_kept_where_there_is_no_path(make_rollouts):
    for options in ({"eta": 0.0}, {"drawn_by": "ema"}):
        with pytest.raises(UserError, match="keep_means"):
            make_rollouts(keep_means=True, **options)


def test_right_after_a_draw_flow_dppo_is_flow_grpo(policy, kept):
    wanted, _ = FlowGRPO(kl_weight=0.0).loss(policy, kept)
    loss, metrics = FlowDPPO().loss(policy, kept)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    assert metrics["clip_fraction"] == 0


def test_grpo_guards_ratio_is_centred_where_flow_grpos_is_not(policy, kept, move):
    move(policy)
    _, plain = FlowGRPO(kl_weight=0.0).loss(policy, kept)
    _, guarded = GRPOGuard(kl_weight=0.0).loss(policy, kept)
    assert plain["ratio"] < 1
    assert abs(guarded["ratio"] - 1) < abs(plain["ratio"] - 1) / 3


def test_grpo_guard_divides_by_the_length_of_the_steps(policy, kept):
    wanted, _ = GRPOGuard(kl_weight=0.0, reweight=False).loss(policy, kept)
    levels = torch.cat([policy.backbone.sampler(kept.num_steps).t.cpu(), torch.zeros(1)])
    weights = [1 / float(levels[k] - levels[k + 1]) for k in kept.steps]
    loss, _ = GRPOGuard(kl_weight=0.0).loss(policy, kept)
    # All ratios are 1, so that every step's loss is −A.
    torch.testing.assert_close(loss, wanted * sum(weights) / len(weights), rtol=1e-3, atol=1e-5)


def test_grpo_guard_refuses_cps_before_anything_is_drawn(make_rollouts):
    with pytest.raises(UserError, match="guard: source: .*`noise: cps`.* use `flow_grpo`"):
        Term(GRPOGuard(), make_rollouts(keep_means=True, noise="cps"), name="guard")


def test_grpo_guard_refuses_rollouts_that_turn_out_to_be_cps(policy, kept):
    with pytest.raises(UserError, match="noise: cps"):
        GRPOGuard(kl_weight=0.0).loss(policy, replace(kept, noise="cps"))


def test_a_threshold_must_be_above_nought():
    with pytest.raises(UserError, match="threshold"):
        FlowDPPO(threshold=0)
