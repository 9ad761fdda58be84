"""SPO: its loss is the authors' code's, and of a fresh draw every ratio to the reference is one."""

import math

import pytest
import torch
from agsm_rl_rewards.brightness import Brightness

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError
from agsm_rl.objectives.spo import SPO, pair_log_probs, spo_loss
from agsm_rl.policy import Policy


def released_log_prob(scheduler, noise_pred, timesteps, x_t, x_next):
    """The authors' `ddim_step_with_logprob` at η = 1, derived again: rows [B] have timesteps of their own."""
    alphas = scheduler.alphas_cumprod
    before = (timesteps - 1000 // scheduler.num_inference_steps).clamp(0, 999)
    alpha, alpha_next = (alphas[at].view(-1, 1, 1, 1) for at in (timesteps, before))
    std = ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
    x0 = (x_t - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
    mean = alpha_next.sqrt() * x0 + (1 - alpha_next - std**2).sqrt() * noise_pred
    density = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=(1, 2, 3))


def released_loss(win, win_reference, lose, lose_reference, beta, eps):
    """The last lines of the authors' training loop: ratios are clipped, and their logarithms compared."""
    ratio_win = torch.clamp(torch.exp(win - win_reference), 1 - eps, 1 + eps)
    ratio_lose = torch.clamp(torch.exp(lose - lose_reference), 1 - eps, 1 + eps)
    return -torch.log(torch.sigmoid(beta * torch.log(ratio_win) - beta * torch.log(ratio_lose))).mean()


def test_the_loss_is_the_released_one_with_its_gradient():
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(64, generator=draw, dtype=torch.float64) for _ in range(4)]
    values = [-1.4 + 0.08 * value for value in values]  # about half of the ratios are clipped
    win, lose = (value.clone().requires_grad_() for value in values[:2])
    loss, metrics = spo_loss(win, lose, values[2], values[3], beta=10.0, clip_range=0.1)
    expected = released_loss(win, values[2], lose, values[3], 10.0, 0.1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for found, wanted in zip(
        torch.autograd.grad(loss, [win, lose]), torch.autograd.grad(expected, [win, lose]), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
        assert (found == 0).any() and (found != 0).any()
    ratios = (win - values[2]).exp(), (lose - values[3]).exp()
    assert metrics["chosen_ratio"].item() == pytest.approx(ratios[0].mean().item())
    assert metrics["clip_fraction"].item() == pytest.approx(((torch.stack(ratios) - 1).abs() > 0.1).double().mean())


def test_the_loss_of_one_pair_is_the_closed_form():
    loss, metrics = spo_loss(*torch.tensor([[0.05], [-0.02], [0.0], [0.01]]), beta=2.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2.0 * (0.05 + 0.03))))
    assert metrics["margin"].item() == pytest.approx(0.16) and metrics["accuracy"].item() == 1
    assert metrics["rejected_ratio"].item() == pytest.approx(math.exp(-0.03))


def test_a_pair_of_weight_0_counts_nothing_and_the_weights_are_a_mean():
    values = 0.05 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    loss, metrics = spo_loss(*values, weight=torch.tensor([1.5, 0.0, 1.5]))
    expected, wanted = spo_loss(*values[:, [0, 2]])
    assert loss.item() == pytest.approx(expected.item())
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}
    )


@pytest.fixture
def make_draw(make_step_preferences):
    """A draw of a backbone's own, with a policy whose adapters have moved off the base, unless they are fresh."""

    def make(backbone, *, adapter="lora", fresh=False, **options):
        made = LoRA(rank=2) if adapter == "lora" else SoftTokens(num_tokens=2, banks=1)
        policy = Policy(backbone, {adapter: made})
        if not fresh:
            draw = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for value in policy.parameters().values():
                    value += 0.1 * torch.randn(value.shape, generator=draw)
        return policy, make_step_preferences(bind=True, **options).next(policy)

    return make


def test_on_a_unet_loss_and_log_probabilities_are_those_of_the_released_code(backbone, make_draw):
    policy, batch = make_draw(backbone, guidance=3.0, num_steps=5, first_step=1)
    scheduler = backbone.sampler(5).scheduler
    timesteps = torch.tensor(scheduler.timesteps.tolist())[batch.step]
    t = (timesteps + 0.5) / 1000
    cond, empty = backbone.encode_text(batch.prompts), backbone.encode_text([""] * len(batch))
    released = []
    for predict in (policy.live, policy.reference):
        without, given = predict(batch.chosen_from, t, empty), predict(batch.chosen_from, t, cond)
        noise = without + 3.0 * (given - without)
        released.append(
            [
                released_log_prob(scheduler, noise, timesteps, batch.chosen_from, x)
                for x in (batch.chosen, batch.rejected)
            ]
        )
    found = pair_log_probs(policy, policy.live, batch, cond, empty[[0]])
    # The very last step ends at timestep 0 there, and before it, at the same ᾱ, in diffusers.
    torch.testing.assert_close(torch.stack(found), torch.stack(released[0]), rtol=1e-5, atol=1e-5)
    (win, lose), (win_reference, lose_reference) = released
    loss, _ = SPO().loss(policy, batch)
    expected = released_loss(win, win_reference, lose, lose_reference, 10.0, 0.1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(loss.item() - math.log(2)) > 1e-4


@pytest.mark.parametrize("adapter", ["lora", "tokens"])
def test_it_learns_from_steps_of_every_layout(each_checkpoint, make_draw, adapter):
    policy, batch = make_draw(load_backbone(str(each_checkpoint), device="cpu"), adapter=adapter)
    loss, metrics = SPO().loss(policy, batch)
    gradients = torch.autograd.grad(loss, list(policy.parameters().values()), allow_unused=True)
    assert all(torch.isfinite(value).all() for value in gradients if value is not None)
    assert sum(value.abs().sum() for value in gradients if value is not None) > 0
    assert all(torch.isfinite(value) for value in metrics.values())


def test_a_fresh_adapter_has_ratio_one_and_costs_log_2(each_checkpoint, make_draw):
    policy, batch = make_draw(load_backbone(str(each_checkpoint), device="cpu"), fresh=True, guidance=2.0)
    loss, metrics = SPO().loss(policy, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["chosen_ratio"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["rejected_ratio"].item() == pytest.approx(1, abs=1e-5)


def test_a_step_of_gradient_descent_prefers_the_brighter_candidates(backbone, make_draw):
    policy, batch = make_draw(backbone, fresh=True)
    parameters = list(policy.parameters().values())
    before, _ = SPO().loss(policy, batch)
    for parameter, gradient in zip(parameters, torch.autograd.grad(before, parameters), strict=True):
        parameter.data -= 0.5 * gradient
    after, metrics = SPO().loss(policy, batch)
    assert after < before
    assert metrics["margin"] > 0 and metrics["chosen_ratio"] > metrics["rejected_ratio"]


def test_passes_of_a_few_pairs_have_the_gradient_of_all(backbone, make_draw):
    policy, batch = make_draw(backbone, guidance=2.0)
    parameters = list(policy.parameters().values())

    def gradient(objective):
        total = [torch.zeros_like(value) for value in parameters]
        for part, share in objective.split(batch):
            loss, _ = objective.loss(policy, part)
            for value, found in zip(total, torch.autograd.grad(loss * share, parameters), strict=True):
                value += found
        return total

    assert len(SPO(rows_per_pass=5).split(batch)) > 1
    for one, other in zip(gradient(SPO()), gradient(SPO(rows_per_pass=5)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{"beta": 0}, {"clip_range": 1.0}, {"clip_range": 0}, {"rows_per_pass": 0}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SPO(**options)


def test_the_brightness_of_these_tests_tells_candidates_apart(backbone, make_draw):
    _, batch = make_draw(backbone)
    images = [backbone.decode(value) for value in (batch.chosen[batch.step == 3], batch.rejected[batch.step == 3])]
    best, worst = (Brightness()(image, ["x"] * len(image)) for image in images)
    assert (best > worst).all()
