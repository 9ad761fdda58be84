"""Reward backpropagation: gradients of the last steps by hand, less memory, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from agsm_rl_rewards.brightness import Brightness
from agsm_rl_rewards.jpeg import JpegCompressibility

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch
from agsm_rl.objectives.reward_backprop import RewardBackprop, reward_backprop_loss
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.sources.prompts import Prompts
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.randomness import Draw
from agsm_rl.training.sampling import step_distribution

PROMPTS = ["a red star", "a blue circle", "two green squares"]
BATCH = Batch(PROMPTS, torch.arange(3))


class Tint:
    """Red minus blue: unlike brightness, far from where pixels are clamped."""

    name = "tint"
    range = (-1.0, 1.0)
    differentiable = True

    def __call__(self, images, prompts):
        return (images[:, 0] - images[:, 2]).mean(dim=(1, 2))


def backprop(**options):
    return RewardBackprop([(Tint(), 1.0)], **({"num_steps": 4, "guidance": 1.0} | options))


def gradient(policy, objective, batch=BATCH):
    parameters = list(policy.parameters().values())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for part, share in objective.split(batch):
        found = torch.autograd.grad(objective.loss(policy, part)[0] * share, parameters, allow_unused=True)
        total = [sum_ if one is None else sum_ + one for sum_, one in zip(total, found, strict=True)]
    return torch.cat([value.flatten() for value in total])


def by_hand(policy, last):
    """The gradient of an unrolled sampler, nothing recomputed."""
    sampler, guidance = policy.backbone.sampler(4), 1.0
    cond, uncond = policy.backbone.encode_text(PROMPTS), policy.backbone.encode_text([""])
    x = policy.draw.noise_like(torch.empty(3, *policy.backbone.latent_shape), BATCH.rows, purpose="start")
    for k in range(4):
        x, _ = step_distribution(policy.live, sampler, k, x, cond, uncond, guidance=guidance, eta=0)
        if k < 4 - last:
            x = x.detach()
    loss = -Tint()(policy.backbone.decode(x), PROMPTS).mean()
    parameters = list(policy.parameters().values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([value.flatten() for value in found])


@pytest.fixture
def each_policy(each_backbone):
    policy = Policy(each_backbone, {"lora": LoRA(rank=2)})
    for parameter in policy.parameters().values():
        parameter.data += 0.02
    policy.draw = Draw(3, "backprop", 1)
    return policy


@pytest.mark.parametrize("last", [1, 2, 4])
def test_gradients_flow_through_the_last_steps_alone(each_policy, last):
    found = gradient(each_policy, backprop(last_steps=last))
    assert found.norm() > 0
    torch.testing.assert_close(found, by_hand(each_policy, last), rtol=1e-4, atol=1e-7)


def test_more_steps_give_another_gradient(policy):
    one, two = gradient(policy, backprop(last_steps=1)), gradient(policy, backprop(last_steps=2))
    assert not torch.allclose(one, two, rtol=0.05)


def test_passes_give_the_same_gradient(policy):
    whole = gradient(policy, backprop(last_steps=2))
    torch.testing.assert_close(gradient(policy, backprop(last_steps=2, images_per_pass=2)), whole, rtol=1e-4, atol=1e-7)


def test_images_are_those_of_the_sampler_whatever_the_gradient_flows_through(policy):
    with torch.no_grad():
        plain = backprop(last_steps=1).images(policy, BATCH)
    torch.testing.assert_close(backprop(last_steps=4).images(policy, BATCH), plain)


def test_a_range_draws_the_number_of_steps_anew_for_each_update(policy):
    objective, drawn = backprop(last_steps=(1, 4)), []
    for step in range(60):
        drawn.append(objective._last_steps(Draw(0, "backprop", step)))
    assert set(drawn) == {1, 2, 3, 4}


def test_the_loss_is_minus_the_mean_reward():
    rewards = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    loss, metrics = reward_backprop_loss(rewards)
    loss.backward()
    assert (loss.item(), metrics["reward"].item()) == (-3.0, 3.0)
    torch.testing.assert_close(rewards.grad, torch.full((3,), -1 / 3))


def test_a_few_steps_raise_the_reward(tiny_checkpoint, make_prompts):
    policy = Policy(load_backbone(str(tiny_checkpoint), device="cpu"), {"lora": LoRA(rank=4)})
    trainer = Trainer(
        policy, [Term(backprop(last_steps=4), make_prompts(3), name="backprop")], steps=20, learning_rate=3e-2
    )
    rewards = [trainer.run_step()["backprop/reward"] for _ in range(20)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.005


@pytest.fixture
def make_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return lambda batch_size: Prompts(str(file), batch_size)


def test_a_black_box_is_refused_with_what_would_work(tiny_checkpoint):
    with pytest.raises(UserError, match=r"'jpeg_compressibility' has no gradient.*brightness.*sharpness.*ddpo"):
        RewardBackprop([(JpegCompressibility(), 1.0)])
    prompts = {"use": "prompts", "prompts": "builtin:shapes-prompts"}
    recipe = {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora"}},
        "objectives": [{"use": "reward_backprop", "rewards": {"shapes": 1.0}, "source": prompts}],
    }
    with pytest.raises(UserError, match=r"objectives\[0\].*'shapes' has no gradient"):
        Recipe.from_data(recipe)


def test_a_reward_that_only_claims_gradients_is_named(policy):
    class Detached(Brightness):
        def __call__(self, images, prompts):
            return super().__call__(images, prompts).detach()

    with pytest.raises(UserError, match="'brightness' carries no gradient, although"):
        RewardBackprop([(Detached(), 1.0)], num_steps=2, guidance=1.0).loss(policy, BATCH)


@pytest.mark.parametrize(
    "options",
    [{"num_steps": 0}, {"eta": -1}, {"last_steps": 0}, {"last_steps": 5}, {"last_steps": (3, 2)}, {"last_steps": True}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        backprop(**options)


def test_prompts_continue_where_they_were_left(policy, make_prompts):
    only = SimpleNamespace(index=0, count=1)
    source = make_prompts(2)
    source.bind("backprop", 0, only)
    source.next(policy)
    state = source.state_dict()
    expected = [source.next(policy).prompts for _ in range(3)]
    other = make_prompts(2)
    other.bind("backprop", 0, only)
    other.load_state_dict(state)
    assert [other.next(policy).prompts for _ in range(3)] == expected
