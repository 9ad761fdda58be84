"""InPO: its inversion is diffusers' DDIM inversion, its target the noise that the inversion amounts to."""

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError
from agsm_rl.interfaces import PairBatch, PreferenceBatch
from agsm_rl.objectives.inpo import InPO
from agsm_rl.training.randomness import Draw


class AtLevel(Draw):
    """The same noise level for every row."""

    def __init__(self, level):
        super().__init__(0, "inpo", 1)
        self.level = level

    def t(self, rows, device=None):
        return torch.full((len(rows),), self.level, device=device)


def pairs(backbone, count=2):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(count, *backbone.latent_shape, generator=generator)
    return PairBatch([f"a red star {n}" for n in range(count)], torch.arange(count), latents)


def released_loop(policy, images, timestep, eta):
    """The authors' inversion, with diffusers' schedulers, our noise, and each image under its prompt."""
    config = policy.backbone.pipeline.scheduler.config
    inverse, forward = DDIMInverseScheduler.from_config(config), DDIMScheduler.from_config(config)
    inverse.set_timesteps(10)
    x, cond = images.latents, policy.backbone.encode_text(images.prompts)
    steps = len(inverse.alphas_cumprod)
    for k, t in enumerate(int(t) for t in inverse.timesteps if t < timestep):
        level = torch.full((len(x),), (t + 0.5) / steps)
        x = inverse.step(policy.live(x, level, cond), t, x).prev_sample
        deviation = forward._get_variance(t + steps // 10, t) ** 0.5
        x = x + eta * policy.draw.noise_like(x, images.rows, purpose=f"inversion{k}") * deviation
    return x


@pytest.mark.parametrize("eta", [0.0, 0.1])
@pytest.mark.parametrize("timestep", [50, 450, 830])
def test_the_inversion_is_the_released_loop(policy, timestep, eta):
    images = pairs(policy.backbone)
    policy.backbone.pipeline.scheduler.register_to_config(steps_offset=0, set_alpha_to_one=True)
    steps = policy.backbone.pipeline.scheduler.config.num_train_timesteps
    policy.draw = AtLevel((timestep + 0.5) / steps)
    x_t, t, target, _ = InPO(inversion_eta=eta, last_step=False).noised(policy, images)
    with torch.no_grad():
        expected = released_loop(policy, images, timestep, eta)
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)
    alpha = DDIMScheduler.from_config(policy.backbone.pipeline.scheduler.config).alphas_cumprod[timestep]
    noise = (expected - images.latents * alpha.sqrt()) / (1 - alpha).sqrt()
    torch.testing.assert_close(target, noise, rtol=1e-3, atol=1e-3)
    assert (t * steps).int().tolist() == [timestep] * 2


@pytest.mark.parametrize("last_step", [True, False])
def test_noising_the_image_by_the_target_gives_what_is_predicted(make_policy, each_checkpoint, last_step):
    from agsm_rl.adapters.lora import LoRA
    from agsm_rl.policy import Policy

    policy = Policy(load_backbone(str(each_checkpoint), device="cpu"), {"lora": LoRA(rank=2)})
    policy.draw, images = AtLevel(0.55), pairs(policy.backbone)
    x_t, t, target, _ = InPO(last_step=last_step).noised(policy, images)
    backbone = policy.backbone
    noise = (
        target
        if backbone.target(images.latents, torch.zeros_like(x_t), t).abs().max() == 0
        else target + images.latents
    )
    torch.testing.assert_close(backbone.add_noise(images.latents, noise, t), x_t, rtol=1e-3, atol=1e-3)
    assert not x_t.requires_grad


def test_finer_steps_approach_one_inversion(policy):
    """The ODE has one solution: with noise off, 40 and 80 steps lie closer together than 5 and 10."""
    images = pairs(policy.backbone)
    policy.draw = AtLevel(0.6)
    five, ten, forty, eighty = (
        InPO(inversion_steps=steps, inversion_eta=0.0).noised(policy, images).x_t for steps in (5, 10, 40, 80)
    )
    assert (forty - eighty).norm() < 0.5 * (five - ten).norm()


def test_a_policy_that_equals_its_reference_costs_log_2_and_gradients_reach_the_adapter(make_backbone):
    from agsm_rl.adapters.lora import LoRA
    from agsm_rl.policy import Policy

    policy = Policy(make_backbone(), {"lora": LoRA(rank=2)})
    images = pairs(policy.backbone, 4).latents
    batch = PreferenceBatch(["a star", "a disc"], torch.arange(2), images[:2], images[2:])
    loss, metrics = InPO().loss(policy, batch)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["margin"].item() == 0
    gradients = torch.autograd.grad(loss, list(policy.parameters().values()), allow_unused=True)
    assert sum(gradient.abs().sum() for gradient in gradients if gradient is not None) > 0


@pytest.mark.parametrize("options", [{"beta": 0}, {"inversion_steps": 0}, {"inversion_eta": 1.5}, {"rows_per_pass": 0}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        InPO(**options)
