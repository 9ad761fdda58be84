"""Flow-GRPO: DDPO's clipped loss plus the KL of each step to the base, on any sampler's Gaussian steps."""

from dataclasses import replace

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.errors import UserError
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.flow_grpo import FlowGRPO, flow_grpo_loss, step_kl
from agsm_rl.objectives.policy_gradient import rollout_steps
from agsm_rl.policy import Policy
from agsm_rl.trainer import Term, Trainer


def moved(policy, by=0.3):
    """The policy with each parameter moved away from where it was."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters().values():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return policy


def gradient(policy, objective, parts):
    total = 0
    parameters = list(policy.parameters().values())
    for part, share in parts:
        found = torch.autograd.grad(objective.loss(policy, part)[0] * share, parameters, allow_unused=True)
        total = total + torch.cat([value.flatten() for value in found if value is not None])
    return total


def test_the_kl_of_a_step_is_that_of_two_normal_distributions_averaged_over_elements():
    mean, reference, std = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor(0.3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).flatten(1).mean(1)
    torch.testing.assert_close(step_kl(mean, reference, std), expected)


def test_a_step_without_noise_has_no_kl():
    assert step_kl(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor(0.0)).tolist() == [0, 0]


def test_the_kl_pulls_the_live_mean_alone_and_by_its_weight():
    mean, reference = (torch.randn(1, 4, requires_grad=True) for _ in range(2))
    std, zero = torch.tensor(0.5), torch.zeros(1)
    loss, metrics = flow_grpo_loss(zero, zero, zero, step_kl(mean, reference, std), clip_range=1e-4, kl_weight=0.2)
    loss.backward()
    assert reference.grad is None
    torch.testing.assert_close(mean.grad, 0.2 * (mean - reference).detach() / (4 * 0.5**2))
    assert loss.item() == pytest.approx(0.2 * metrics["kl"].item())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_fresh_rollouts_have_ratio_one(policy, make_rollouts, guidance):
    batch = make_rollouts(bind=True, guidance=guidance, advantages="group").next(moved(policy))
    _, metrics = FlowGRPO().loss(policy, batch)
    assert metrics["ratio_deviation"].item() < 1e-5
    assert metrics["kl"].item() > 0


def test_a_policy_that_equals_the_base_has_no_kl(make_backbone, rollouts):
    policy = Policy(make_backbone(), {"lora": LoRA(rank=2)})
    _, metrics = FlowGRPO().loss(policy, rollouts.next(policy))
    assert metrics["kl"].item() == 0
    assert metrics["ratio_deviation"].item() < 1e-5


def test_the_kl_of_a_policy_is_that_of_its_steps_to_the_base_models(policy, make_backbone, make_rollouts):
    """The base here is a pipeline that no adapter was ever attached to."""
    batch, k = make_rollouts(bind=True, guidance=3.0).next(moved(policy)), 2
    bare = make_backbone()
    sampler, rows = bare.sampler(batch.num_steps), len(batch)
    t, x_t = sampler.t[k].expand(rows), batch.trajectory[:, k]
    cond, uncond = bare.encode_text(batch.prompts), bare.encode_text([""]).expand(rows)
    with torch.no_grad():
        without = bare.predict(x_t, t, uncond)
        prediction = without + 3.0 * (bare.predict(x_t, t, cond) - without)
        reference, std = sampler.transition(k, x_t, prediction, eta=1.0)
        mean, _ = rollout_steps(policy, policy.live, replace(batch, steps=(k,)))[0]
        part = FlowGRPO().split(batch)[k][0]
        _, metrics = FlowGRPO().loss(policy, part)
    expected = ((mean - reference) ** 2).mean() / (2 * std**2)
    assert metrics["kl"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_without_a_kl_it_is_ddpo_and_computes_no_reference(policy, rollouts, monkeypatch):
    batch = rollouts.next(moved(policy))
    monkeypatch.setattr(policy, "reference", None)
    ours, ddpo = FlowGRPO(kl_weight=0.0), DDPO()
    assert ours.loss(policy, batch)[0] == ddpo.loss(policy, batch)[0]
    whole = [(batch, 1.0)]
    assert torch.equal(gradient(policy, ours, whole), gradient(policy, ddpo, whole))


def test_the_kl_adds_its_own_gradient(policy, make_rollouts):
    """At equal rewards there is no advantage, and what is left pulls the steps to the base's."""
    batch = make_rollouts(bind=True).next(moved(policy))
    batch.advantages.zero_()
    objective = FlowGRPO(kl_weight=1.0)
    before = objective.loss(policy, batch)[1]["kl"]
    parameters = list(policy.parameters().values())
    loss, _ = objective.loss(policy, batch)
    for parameter, value in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if value is not None:
            parameter.data -= 1e-3 * value / value.norm().clamp(min=1e-9)
    assert objective.loss(policy, batch)[1]["kl"] < before


def test_learning_in_parts_gives_the_gradient_of_all_steps_at_once(policy, rollouts):
    batch = rollouts.next(moved(policy))
    objective = FlowGRPO(kl_weight=0.5)
    whole = gradient(policy, objective, [(batch, 1.0)])
    fewer = FlowGRPO(kl_weight=0.5, images_per_pass=3).split(batch)
    assert len(fewer) == 8
    for parts in (objective.split(batch), fewer):
        # Of the whole vector: single elements near zero differ more, by the order of sums.
        assert (gradient(policy, objective, parts) - whole).norm() < 1e-3 * whole.norm()


def test_it_trains_beside_ddpo_on_one_draw_of_group_relative_rollouts(policy, make_rollouts):
    source = make_rollouts(advantages="group")
    terms = [Term(FlowGRPO(), source, name="flow_grpo"), Term(DDPO(), source, name="ddpo")]
    metrics = Trainer(policy, terms, steps=1).run_step()
    assert source.state_dict()["draws"] == 1
    # Both are the policy gradient; what differs is the KL.
    assert metrics["cosine/flow_grpo/ddpo"] > 0.5


@pytest.mark.parametrize(
    "options", [{"clip_range": 0}, {"kl_weight": -1}, {"timestep_fraction": 0}, {"images_per_pass": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        FlowGRPO(**options)


def test_the_published_kl_leaves_the_step_s_length_out_of_the_variance(sd3_backbone, make_rollouts):
    policy = Policy(sd3_backbone, {"lora": LoRA(rank=2)})
    batch = make_rollouts(bind=True).next(moved(policy))
    sigmas = policy.backbone.sampler(batch.num_steps).sigmas
    for part, _ in FlowGRPO().split(batch):
        exact, published = (FlowGRPO(kl=kl).loss(policy, part)[1]["kl"].item() for kl in ("exact", "published"))
        (k,) = part.steps
        assert exact > 0 and published == pytest.approx(exact * (sigmas[k] - sigmas[k + 1]).item(), rel=1e-5)


def test_the_published_kl_is_refused_on_steps_that_were_not_published(policy, rollouts):
    with pytest.raises(UserError, match="kl: published, but the rollouts draw with `noise: ddim`"):
        FlowGRPO(kl="published").loss(policy, rollouts.next(policy))


def test_a_detached_unconditional_branch_changes_the_gradient_and_not_the_loss(policy, make_rollouts):
    batch = make_rollouts(bind=True, guidance=3.0).next(moved(policy))
    batch.advantages.copy_(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    both, one = FlowGRPO(), FlowGRPO(detach_unconditional=True)
    assert both.loss(policy, batch)[0] == one.loss(policy, batch)[0]
    with_both, with_one = (gradient(policy, objective, [(batch, 1.0)]) for objective in (both, one))
    assert with_one.norm() > 0 and (with_both - with_one).norm() > 1e-3 * with_both.norm()


def test_a_kept_graph_has_no_detached_branch(policy, make_rollouts):
    batch = make_rollouts(bind=True, guidance=3.0, keep_graph=True).next(policy)
    with pytest.raises(UserError, match="`keep_graph` records gradients through both branches"):
        FlowGRPO(detach_unconditional=True).loss(policy, batch)
