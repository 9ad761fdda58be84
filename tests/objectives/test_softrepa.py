"""SoftREPA's loss against its equations written as loops, and its place in a policy."""

import math

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.softrepa import SoftREPA, softrepa_loss


def grid(images=3, prompts=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(images, 2, 3, 3, generator=generator)
    live = target[:, None] + 0.3 * torch.randn(images, prompts, 2, 3, 3, generator=generator)
    return live, target, torch.tensor([2, 0, 3])


def by_loops(live, target, own, temperature, scale, positive_weight):
    """REFERENCE §2, one image and prompt at a time, in double precision."""
    live, target = live.double(), target.double()
    contrastive, positive = [], []
    for i in range(live.shape[0]):
        errors = [((live[i, j] - target[i]) ** 2).mean() for j in range(live.shape[1])]
        logits = [scale * torch.exp(-error / temperature) for error in errors]
        total = sum(torch.exp(logit) for logit in logits)
        contrastive.append(-torch.log(torch.exp(logits[own[i]]) / total))
        positive.append(errors[own[i]])
    return sum(contrastive) / len(contrastive) + positive_weight * sum(positive) / len(positive)


PUBLISHED = (0.07, 4.0, 10.0)


@pytest.mark.parametrize("options", [PUBLISHED, (0.07, 4.0, 0.0), (1.0, 2.0, 0.5)])
def test_the_loss_and_its_gradient_equal_an_explicit_double_loop(options):
    live, target, own = grid()
    live.requires_grad_(True)
    named = dict(zip(("temperature", "scale", "positive_weight"), options, strict=True))
    loss, _ = softrepa_loss(live, target, own=own, **named)
    expected = by_loops(live, target, own, *options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (found,), (wanted,) = torch.autograd.grad(loss, live), torch.autograd.grad(expected, live)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_published_settings_are_the_defaults():
    live, target, own = grid()
    assert softrepa_loss(live, target, own=own)[0].item() == pytest.approx(
        by_loops(live, target, own, *PUBLISHED).item(), rel=1e-5
    )


def test_prompts_that_cannot_be_told_apart_cost_the_logarithm_of_their_number():
    target = torch.randn(2, 1, 2, 2)
    live = target[:, None].expand(2, 5, 1, 2, 2)
    loss, metrics = softrepa_loss(live, target, own=torch.tensor([0, 4]))
    assert loss.item() == pytest.approx(math.log(5))
    assert (metrics["win_rate"].item(), metrics["margin"].item()) == (0, 0)


def test_the_gradient_pulls_the_own_prompt_to_the_target_and_pushes_the_others_away():
    live, target, own = grid()
    live.requires_grad_(True)
    loss, _ = softrepa_loss(live, target, own=own, positive_weight=0.0)
    (gradient,) = torch.autograd.grad(loss, live)
    towards = ((target[:, None] - live.detach()) * -gradient).sum(dim=(2, 3, 4))
    is_own = torch.nn.functional.one_hot(own, 4).bool()
    assert (towards[is_own] > 0).all()
    assert (towards[~is_own] < 0).all()


def test_only_the_live_predictions_get_a_gradient():
    live, target, own = grid()
    live.requires_grad_(True), target.requires_grad_(True)
    loss, metrics = softrepa_loss(live, target, own=own)
    loss.backward()
    assert live.grad.abs().sum() > 0
    assert target.grad is None
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())


@pytest.fixture
def batch(policy):
    latents = torch.randn(8, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return PairBatch([f"a red star {n}" for n in range(8)], torch.arange(8), latents)


def gradient_of(policy, objective, batch):
    parameters, total = policy.parameters(), {}
    for part, share in objective.split(batch):
        found = torch.autograd.grad(
            objective.loss(policy, part)[0] * share, list(parameters.values()), allow_unused=True
        )
        for name, value in zip(parameters, found, strict=True):
            if value is not None:
                total[name] = total.get(name, 0) + value
    return total


def test_all_prompts_use_the_positive_bank(policy, batch):
    gradient = gradient_of(policy, SoftREPA(), batch)
    assert {name for name in gradient if ".negative." in name} == set()
    tokens = gradient["tokens.soft_tokens"]
    assert tokens[0].abs().sum() > 0
    assert tokens[1].abs().sum() == 0


def test_fewer_groups_at_once_give_the_same_gradient(policy, batch):
    whole, parts = (gradient_of(policy, SoftREPA(groups_per_pass=count), batch) for count in (None, 1))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"scale": 0}, {"positive_weight": -1}, {"group_size": 1}, {"groups_per_pass": 0}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SoftREPA(**options)


def test_a_batch_of_broken_groups_is_refused():
    with pytest.raises(UserError, match="not a multiple of group_size 4"):
        SoftREPA().check(6)
