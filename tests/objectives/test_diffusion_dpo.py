"""Diffusion-DPO: log 2 at the reference, the direction of its gradient, its symmetry, and its place in a policy."""

import math

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PreferenceBatch
from agsm_rl.objectives.diffusion_dpo import DiffusionDPO, diffusion_dpo_loss
from agsm_rl.training.randomness import Draw


def errors(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, generator=generator) * 1e-2 for _ in range(4)]


def test_a_policy_that_equals_its_reference_costs_log_2():
    chosen, rejected, _, _ = errors()
    loss, metrics = diffusion_dpo_loss(chosen, rejected, chosen, rejected, beta=5000.0)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["accuracy"].item() == 0.5
    assert metrics["margin"].item() == 0


@pytest.mark.parametrize("beta", [1.0, 2000.0, 5000.0])
def test_the_loss_is_the_paper_s_by_hand(beta):
    chosen, rejected, reference_chosen, reference_rejected = (values.double() for values in errors())
    loss, metrics = diffusion_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=beta)
    inner = [
        -beta / 2 * ((won - won_reference) - (lost - lost_reference))
        for won, lost, won_reference, lost_reference in zip(
            chosen, rejected, reference_chosen, reference_rejected, strict=True
        )
    ]
    expected = [-math.log(1 / (1 + math.exp(-float(value)))) for value in inner]
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(sum(float(value) > 0 for value in inner) / len(inner))
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())


def test_the_gradient_lowers_the_chosen_image_s_error_and_raises_the_rejected_one_s():
    given = [values.requires_grad_(True) for values in errors()]
    loss, _ = diffusion_dpo_loss(*given, beta=2000.0)
    loss.backward()
    chosen, rejected, *reference = given
    assert (chosen.grad > 0).all()
    torch.testing.assert_close(rejected.grad, -chosen.grad)
    assert all(values.grad is None for values in reference)


def test_exchanging_the_images_turns_the_margin_around():
    chosen, rejected, reference_chosen, reference_rejected = errors()
    loss, metrics = diffusion_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=2000.0)
    other, turned = diffusion_dpo_loss(rejected, chosen, reference_rejected, reference_chosen, beta=2000.0)
    assert turned["margin"].item() == pytest.approx(-metrics["margin"].item())
    assert turned["accuracy"].item() == pytest.approx(1 - metrics["accuracy"].item())
    # -log σ(-x) = x - log σ(x), averaged over the pairs.
    assert other.item() == pytest.approx(loss.item() + metrics["margin"].item(), rel=1e-4)


@pytest.fixture
def batch(policy):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (torch.randn(4, *policy.backbone.latent_shape, generator=generator) for _ in range(2))
    return PreferenceBatch([f"a red star {n}" for n in range(4)], torch.arange(4), chosen, rejected)


def test_both_images_are_judged_at_the_same_noise_and_level(policy, batch):
    """The same image twice: nothing is to be learned, whatever the policy has become."""
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.1)
    same = PreferenceBatch(batch.prompts, batch.rows, batch.chosen, batch.chosen)
    loss, metrics = DiffusionDPO().loss(policy, same)
    assert metrics["chosen_change"].abs() > 1e-5
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)
    torch.testing.assert_close(metrics["chosen_change"], metrics["rejected_change"], rtol=1e-3, atol=1e-6)


def test_the_reference_is_the_base_model_without_adapters(make_policy, batch):
    policy = make_policy()
    policy.draw = Draw(0, "dpo", 2)
    _, metrics = DiffusionDPO().loss(policy, batch)
    noise, t = policy.draw.noise_like(batch.chosen, batch.rows), policy.draw.t(batch.rows)
    x_t = policy.backbone.add_noise(batch.chosen, noise, t)
    cond = policy.backbone.encode_text(batch.prompts)
    live = ((policy.live(x_t, t, cond) - noise) ** 2).mean()
    for adapter in policy.adapters.values():
        adapter.detach()
    base = ((policy.backbone.predict(x_t, t, cond) - noise) ** 2).mean()
    assert metrics["chosen_change"].item() == pytest.approx((live - base).item(), rel=1e-3, abs=1e-7)


def test_a_lora_that_was_not_trained_yet_is_its_reference_exactly(make_backbone, batch):
    from agsm_rl.adapters.lora import LoRA
    from agsm_rl.policy import Policy

    loss, metrics = DiffusionDPO().loss(Policy(make_backbone(), {"lora": LoRA(rank=2)}), batch)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["accuracy"].item() == 0.5


def test_fewer_rows_at_once_give_the_same_gradient(policy, batch):
    parameters = list(policy.parameters().values())

    def gradient(objective):
        total = 0
        for part, share in objective.split(batch):
            found = torch.autograd.grad(objective.loss(policy, part)[0] * share, parameters, allow_unused=True)
            total = total + torch.cat([value.flatten() for value in found if value is not None])
        return total

    whole, parts = gradient(DiffusionDPO(beta=100.0)), gradient(DiffusionDPO(beta=100.0, rows_per_pass=3))
    assert whole.abs().sum() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"beta": 0}, {"rows_per_pass": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        DiffusionDPO(**options)
