"""Score matching: its gradient by hand, noise levels an image, and captions that are dropped."""

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.score_matching import ScoreMatching, score_matching_loss
from agsm_rl.training.randomness import Draw


@pytest.fixture
def batch(policy):
    latents = torch.randn(6, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return PairBatch([f"a red star {n}" for n in range(6)], torch.arange(6), latents)


def test_the_gradient_is_twice_the_difference_over_the_number_of_elements():
    live, target = torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 4, 4, requires_grad=True)
    loss, _ = score_matching_loss(live, target)
    loss.backward()
    torch.testing.assert_close(live.grad, 2 * (live - target).detach() / live.numel())
    assert target.grad is None
    assert loss.item() == pytest.approx(((live - target) ** 2).mean().item())


def test_the_loss_is_the_error_of_each_image_at_its_own_noise_level(policy, batch):
    policy.draw = Draw(3, "score_matching", 5, t_range=(0.2, 0.6))
    loss, _ = ScoreMatching().loss(policy, batch)
    errors = []
    for row in range(len(batch)):
        one = batch.select(torch.tensor([row]))
        noise, t = policy.draw.noise_like(one.latents, one.rows), policy.draw.t(one.rows)
        x_t = policy.backbone.add_noise(one.latents, noise, t)
        live = policy.live(x_t, t, policy.backbone.encode_text(one.prompts))
        errors.append(((live - policy.backbone.target(one.latents, noise, t)) ** 2).mean().item())
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    levels = policy.draw.t(batch.rows)
    assert len(set(levels.tolist())) == len(batch)
    assert levels.min() >= 0.2
    assert levels.max() <= 0.6


def prompts_seen(policy, objective, batch):
    """The prompts that the live prediction is made under."""
    seen, live = [], policy.live
    policy.live = lambda x_t, t, cond: seen.extend(cond.prompts) or live(x_t, t, cond)
    for part, _ in objective.split(batch):
        objective.loss(policy, part)
    policy.live = live
    return seen


def test_captions_are_kept_unless_dropping_is_asked_for(policy, batch):
    assert prompts_seen(policy, ScoreMatching(), batch) == batch.prompts


def test_the_same_captions_are_dropped_in_one_pass_or_several(policy, batch):
    policy.draw = Draw(0, "score_matching", 1)
    whole = prompts_seen(policy, ScoreMatching(caption_dropout=0.5), batch)
    parts = prompts_seen(policy, ScoreMatching(caption_dropout=0.5, rows_per_pass=2), batch)
    assert whole == parts
    assert 0 < whole.count("") < len(batch)
    assert all(seen in ("", own) for seen, own in zip(whole, batch.prompts, strict=True))


def test_a_caption_is_dropped_as_often_as_asked():
    rows = torch.arange(64)
    shares = torch.cat([Draw(0, "score_matching", step).uniform(rows, purpose="caption dropout") for step in range(40)])
    # 2,560 independent draws: five standard deviations of a share of 0.1 are 0.03.
    assert (shares < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_fewer_rows_at_once_give_the_same_gradient(policy, batch):
    parameters = list(policy.parameters().values())

    def gradient(objective):
        total = 0
        for part, share in objective.split(batch):
            found = torch.autograd.grad(objective.loss(policy, part)[0] * share, parameters, allow_unused=True)
            total = total + torch.cat([value.flatten() for value in found if value is not None])
        return total

    whole, parts = gradient(ScoreMatching()), gradient(ScoreMatching(rows_per_pass=4))
    assert whole.abs().sum() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{"caption_dropout": 1.0}, {"caption_dropout": -0.1}, {"rows_per_pass": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        ScoreMatching(**options)
