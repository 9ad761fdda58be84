"""AGSM's loss against the paper's equations written as loops, and its place in a policy."""

import math

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.agsm import AGSM, guided_score_loss
from agsm_rl.training.randomness import Draw


def grid(images=3, prompts=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    live = torch.randn(images, prompts, 2, 3, 3, generator=generator, dtype=torch.float64).float()
    ema = torch.randn(images, prompts, 2, 3, 3, generator=generator, dtype=torch.float64).float()
    target = torch.randn(images, 2, 3, 3, generator=generator, dtype=torch.float64).float()
    return live, ema, target, torch.tensor([2, 0, 3])


def by_loops(live, ema, target, own, temperature, gamma_positive, gamma_negative):
    """REFERENCE equations, one image and prompt at a time, in double precision."""
    live, ema, target = live.double(), ema.double(), target.double()
    positives, negatives = [], []
    for i in range(live.shape[0]):
        rewards = [-float(((target[i] - ema[i, j]) ** 2).mean()) for j in range(live.shape[1])]
        total = sum(math.exp(r / temperature) for r in rewards)
        weights = [math.exp(r / temperature) / total for r in rewards]
        mean = sum(w * ema[i, j] for j, w in enumerate(weights))
        for j in range(live.shape[1]):
            delta = ema[i, j] - mean
            if j == own[i]:
                positives.append(((live[i, j] - (target[i] + gamma_positive * delta)) ** 2).mean())
            else:
                negatives.append(((live[i, j] - (target[i] - gamma_negative * delta)) ** 2).mean())
    loss = sum(positives) / len(positives)
    return loss + sum(negatives) / len(negatives) if gamma_negative else loss


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(("gamma_positive", "gamma_negative"), [(1.0, 1.0), (1.0, 0.1), (0.5, 0.0)])
def test_the_loss_equals_an_explicit_double_loop(temperature, gamma_positive, gamma_negative):
    live, ema, target, own = grid()
    loss, _ = guided_score_loss(
        live,
        ema,
        target,
        own=own,
        temperature=temperature,
        gamma_positive=gamma_positive,
        gamma_negative=gamma_negative,
    )
    expected = by_loops(live, ema, target, own, temperature, gamma_positive, gamma_negative)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("gamma_positive", "gamma_negative"), [(1.0, 1.0), (0.5, 0.1)])
def test_bradley_terry_s_loss_equals_an_explicit_double_loop(gamma_positive, gamma_negative):
    live, ema, target, own = grid()
    positives, negatives = [], []
    for i in range(len(live)):
        reward = [-float(((target[i] - ema[i, j]) ** 2).mean()) for j in range(live.shape[1])]
        o, toward = int(own[i]), 0.0
        for j in range(live.shape[1]):
            if j == o:
                continue
            chance = 1 / (1 + math.exp(-(reward[o] - reward[j]) / 0.1))  # that the own prompt is preferred
            mean = chance * ema[i, o] + (1 - chance) * ema[i, j]
            toward = toward + (ema[i, o] - mean) / (live.shape[1] - 1)
            negatives.append(((live[i, j] - (target[i] - gamma_negative * (ema[i, j] - mean))) ** 2).mean())
        positives.append(((live[i, o] - (target[i] + gamma_positive * toward)) ** 2).mean())
    expected = sum(positives) / len(positives) + sum(negatives) / len(negatives)
    gammas = {"gamma_positive": gamma_positive, "gamma_negative": gamma_negative}
    loss, _ = guided_score_loss(live, ema, target, own=own, preference="bradley_terry", **gammas)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_with_two_prompts_bradley_terry_is_plackett_luce():
    live, ema, target, _ = grid(prompts=2)
    one, other = (
        guided_score_loss(live, ema, target, own=torch.tensor([1, 0, 1]), preference=name)[0]
        for name in ("plackett_luce", "bradley_terry")
    )
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_only_the_live_predictions_get_a_gradient():
    live, ema, target, own = grid()
    for tensor in (live, ema, target):
        tensor.requires_grad_(True)
    loss, _ = guided_score_loss(live, ema, target, own=own)
    loss.backward()
    assert live.grad.abs().sum() > 0
    assert ema.grad is None
    assert target.grad is None


def test_the_gradient_of_the_loss_is_that_of_the_loop():
    live, ema, target, own = grid()
    live.requires_grad_(True)
    loss, _ = guided_score_loss(live, ema, target, own=own)
    (found,) = torch.autograd.grad(loss, live)
    (expected,) = torch.autograd.grad(by_loops(live, ema, target, own, 0.1, 1.0, 1.0), live)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_negatives_are_left_out_when_their_gamma_is_zero():
    live, ema, target, own = grid()
    live.requires_grad_(True)
    loss, metrics = guided_score_loss(live, ema, target, own=own, gamma_negative=0.0)
    (gradient,) = torch.autograd.grad(loss, live)
    others = ~torch.nn.functional.one_hot(own, 4).bool()
    assert gradient[others].abs().max() == 0
    assert "negative_loss" not in metrics


def test_the_win_rate_counts_images_whose_own_prompt_predicts_best():
    target = torch.zeros(2, 1, 1, 1)
    ema = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[:, :, None, None, None]
    _, metrics = guided_score_loss(ema.clone(), ema, target, own=torch.tensor([0, 1]))
    assert metrics["win_rate"].item() == 0.5
    assert all(metric.ndim == 0 for metric in metrics.values())


def test_fewer_groups_at_once_give_the_same_gradient(policy):
    latents = torch.randn(8, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    batch = PairBatch([f"a red star {n}" for n in range(8)], torch.arange(8), latents)
    parameters = list(policy.parameters().values())

    def gradient(objective):
        total = 0
        for part, share in objective.split(batch):
            loss, _ = objective.loss(policy, part)
            found = torch.autograd.grad(loss * share, parameters, allow_unused=True)
            total = total + torch.cat([value.flatten() for value in found if value is not None])
        return total

    torch.testing.assert_close(gradient(AGSM(groups_per_pass=1)), gradient(AGSM()), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"preference": "bt"},
        {"group_size": 1},
        {"groups_per_pass": 0},
        {"images_per_pass": 0},
        {"negatives": 0},
        {"negatives": 4},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        AGSM(**options)


def test_a_batch_of_broken_groups_is_refused():
    with pytest.raises(UserError, match="not a multiple of group_size 4"):
        AGSM().check(6)


@pytest.mark.parametrize("preference", ["plackett_luce", "bradley_terry"])
def test_mixed_precision_does_not_round_the_guidance(preference):
    live, ema, target, own = grid()
    ema = ema[:, :1] + 0.01 * ema  # predictions under different prompts are much alike
    live.requires_grad_(True)
    loss, _ = guided_score_loss(live, ema, target, own=own, preference=preference)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = guided_score_loss(live, ema, target, own=own, preference=preference)
    assert torch.equal(mixed, loss)


def flat_gradient(policy, loss):
    found = torch.autograd.grad(loss, list(policy.parameters().values()), allow_unused=True, materialize_grads=True)
    return torch.cat([value.flatten() for value in found])


def gradient_of(policy, objective, batch):
    loss, metrics = objective.loss(policy, batch)
    return flat_gradient(policy, loss), metrics


@pytest.fixture
def pairs(policy):
    latents = torch.randn(4, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return PairBatch([f"a red star {n}" for n in range(4)], torch.arange(4), latents)


@pytest.fixture
def live_rows(policy, monkeypatch):
    """How many rows each live prediction had."""
    rows, live = [], policy.live

    def noted(x_t, *rest, **options):
        rows.append(len(x_t))
        return live(x_t, *rest, **options)

    monkeypatch.setattr(policy, "live", noted)
    return rows


def test_without_a_negative_loss_only_own_prompts_are_predicted_live(policy, pairs, live_rows):
    found, metrics = gradient_of(policy, AGSM(gamma_negative=0.0), pairs)
    assert live_rows == [4]
    grid = AGSM().groups.grid(policy, pairs)
    loss, wanted_metrics = guided_score_loss(
        grid.predict(policy.live), grid.predict(policy.ema), grid.target, own=grid.own, gamma_negative=0.0
    )
    torch.testing.assert_close(found, flat_gradient(policy, loss), rtol=1e-4, atol=1e-7)
    assert metrics == wanted_metrics


def test_some_negatives_are_predicted_and_learned_from(policy, pairs, live_rows):
    _, metrics = gradient_of(policy, AGSM(negatives=1), pairs)
    assert live_rows == [8]
    assert metrics["negative_loss"] > 0


def test_as_many_negatives_as_there_are_is_all_of_them(policy, pairs):
    all_of_them, _ = gradient_of(policy, AGSM(), pairs)
    torch.testing.assert_close(gradient_of(policy, AGSM(negatives=3), pairs)[0], all_of_them, rtol=1e-4, atol=1e-7)


def test_over_all_choices_of_one_negative_the_mean_loss_is_that_of_all():
    live, ema, target, own = grid()
    whole, _ = guided_score_loss(live, ema, target, own=own)
    is_own = torch.nn.functional.one_hot(own, 4).bool()
    total = 0.0
    for shift in range(3):  # each image's others in turn
        learned = torch.zeros(3, 4, dtype=torch.bool)
        for image in range(3):
            learned[image, (~is_own[image]).nonzero().flatten()[shift]] = True
        total += guided_score_loss(live, ema, target, own=own, learned=learned)[0] / 3
    torch.testing.assert_close(total, whole)


def test_the_choice_changes_from_step_to_step_and_not_with_the_parts_of_a_batch(policy):
    latents = torch.randn(8, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    batch = PairBatch([f"a red star {n}" for n in range(8)], torch.arange(8), latents)
    objective = AGSM(negatives=1, groups_per_pass=1)

    def chosen(step):
        draw = Draw(0, "agsm", step)
        grids = [objective.groups.grid(policy, part) for part, _ in objective.split(batch)]
        rows = [part.rows for part, _ in objective.split(batch)]
        return torch.cat([grid.some_negatives(draw, row, 1) for grid, row in zip(grids, rows, strict=True)])

    whole = AGSM(negatives=1).groups.grid(policy, batch)
    assert torch.equal(chosen(0), whole.some_negatives(Draw(0, "agsm", 0), batch.rows, 1))
    assert chosen(0).sum(dim=1).tolist() == [1] * 8
    assert any(not torch.equal(chosen(0), chosen(step)) for step in (1, 2, 3))
