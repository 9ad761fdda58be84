"""The anchor holds a policy to the base model, and to nothing else."""

import pytest
import torch

from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.anchor import Anchor, score_anchor_loss


@pytest.fixture
def batch(policy):
    latents = torch.randn(4, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return PairBatch(["a red star"] * 4, torch.arange(4), latents)


def test_the_loss_is_the_mean_squared_distance_and_moves_the_live_prediction_alone():
    live, reference = torch.randn(2, 1, 3, 3, requires_grad=True), torch.randn(2, 1, 3, 3, requires_grad=True)
    loss, _ = score_anchor_loss(live, reference)
    loss.backward()
    assert loss.item() == pytest.approx(((live - reference) ** 2).mean().item())
    torch.testing.assert_close(live.grad, 2 * (live - reference).detach() / live.numel())
    assert reference.grad is None


def test_a_policy_that_equals_the_base_is_not_pulled(make_backbone, batch):
    from agsm_rl.adapters.lora import LoRA
    from agsm_rl.policy import Policy

    policy = Policy(make_backbone(), {"lora": LoRA(rank=2)})
    loss, _ = Anchor().loss(policy, batch)
    assert loss.item() == 0


def test_steps_against_the_anchors_gradient_bring_the_policy_back_to_the_base(policy, batch):
    parameters = list(policy.parameters().values())
    first, _ = Anchor().loss(policy, batch)
    loss = first
    for _ in range(5):
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.data -= 0.5 * gradient
        loss, _ = Anchor().loss(policy, batch)
    assert 0 < loss.item() < first.item()
