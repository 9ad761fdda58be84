"""The published trainer's cost model does the same work as our AGSM, or a comparison of times would mean nothing."""

import pytest
import torch
from agsm_step import captioned_images, disagreement, make_published

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.policy import Policy


@pytest.fixture
def policy(make_backbone) -> Policy:
    """Soft tokens whose EMA differs from them, all of them from each other."""
    policy = Policy(make_backbone(), {"tokens": SoftTokens(num_tokens=2, jitter=0.1)})
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.mark.parametrize(("images", "group_size"), [(4, 4), (4, 2)])
def test_the_published_step_and_ours_agree_in_loss_and_gradients(policy, make_backbone, images, group_size):
    published = make_published(policy, make_backbone().pipeline, group_size=group_size)
    found = disagreement(policy, published, AGSM(group_size=group_size), images)
    assert set(found) == {"loss", "tokens.soft_tokens", "tokens.time_tokens"}
    assert max(found.values()) < 1e-4


def test_another_ema_shows_as_a_disagreement(policy, make_backbone):
    published = make_published(policy, make_backbone().pipeline, group_size=2)
    policy.restart_ema()
    assert max(disagreement(policy, published, AGSM(group_size=2), 4).values()) > 1e-3


def test_a_published_step_changes_the_tokens_and_no_weight(policy, make_backbone):
    pipeline = make_backbone().pipeline
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    published = make_published(policy, pipeline, group_size=2)
    tokens = [parameter.detach().clone() for parameter in published.parameters]
    shadow = published.ema.soft_tokens.detach().clone()
    published.step(*captioned_images(4, 16))
    assert all(not torch.equal(old, new) for old, new in zip(tokens, published.parameters, strict=True))
    assert not torch.equal(shadow, published.ema.soft_tokens)
    for weights in (published.live.unet.state_dict(), published.ema.unet.state_dict()):
        assert all(torch.equal(value, weights[name]) for name, value in before.items())
