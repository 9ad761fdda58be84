"""SD3's steps: diffusers' Euler step without noise, and with noise an SDE that keeps the ODE's marginals."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from agsm_rl.backbones.flow import FlowSampler, flow_scheduler
from agsm_rl.errors import UserError

SD3 = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)


def sampler(num_steps: int, config: dict | None = None) -> FlowSampler:
    return FlowSampler(config or SD3, num_steps, torch.device("cpu"), image_tokens=16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("num_steps", [1, 5, 28])
def test_without_noise_a_step_is_diffusers_own_bit_for_bit(num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SD3)
    scheduler.set_timesteps(num_steps)
    ours, x_t = sampler(num_steps), normal(2, 16, 8, 8)
    assert torch.equal(ours.t * 1000, scheduler.timesteps)
    for k, timestep in enumerate(scheduler.timesteps):
        prediction = normal(2, 16, 8, 8, seed=k + 1)
        mean, std = ours.transition(k, x_t, prediction, eta=0.0)
        x_t = scheduler.step(prediction, timestep, x_t).prev_sample
        assert torch.equal(mean, x_t) and std == 0


def test_a_schedule_that_depends_on_the_picture_s_size_is_the_pipeline_s() -> None:
    config = dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(7, mu=0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256))
    torch.testing.assert_close(sampler(7, config).sigmas, scheduler.sigmas)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("num_steps", [2, 10, 28])
def test_for_a_known_image_each_step_has_exactly_the_ode_s_mean_and_variance(num_steps: int, eta: float) -> None:
    """For x0 = c the flow is v = (x_t − c) / t, and the ODE carries N((1 − t)c, t²) to N((1 − t')c, t'²)."""
    c, ours = 1.7, sampler(num_steps)
    for k in range(num_steps):
        now, later = ours.sigmas[k].double(), ours.sigmas[k + 1].double()
        # The step is affine in x_t: two points give its slope and its offset.
        points = torch.tensor([0.0, 1.0], dtype=torch.float64)
        (offset, second), std = ours.transition(k, points, (points - c) / now, eta=eta)
        slope = second - offset
        mean = slope * (1 - now) * c + offset
        variance = slope**2 * now**2 + std**2
        torch.testing.assert_close(mean, (1 - later) * c, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance, later**2, rtol=1e-6, atol=1e-9)
        assert (std > 0) == (eta > 0 and later > 0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_for_gaussian_images_the_marginals_come_closer_as_steps_get_smaller(eta: float) -> None:
    """x0 ~ N(m, d²): the exact flow is linear, so that mean and variance can be carried along without sampling."""
    m, d = -0.8, 0.6

    def flow(x: Tensor, t: Tensor) -> Tensor:
        total = (1 - t) ** 2 * d**2 + t**2
        away = x - (1 - t) * m
        return t / total * away - (m + (1 - t) * d**2 / total * away)  # E[noise | x] − E[x0 | x]

    def final_variance(num_steps: int) -> float:
        ours, variance = sampler(num_steps), torch.tensor(1.0, dtype=torch.float64)
        mean = torch.tensor(0.0, dtype=torch.float64)
        points = torch.tensor([0.0, 1.0], dtype=torch.float64)
        for k in range(num_steps):
            (offset, second), std = ours.transition(k, points, flow(points, ours.sigmas[k].double()), eta=eta)
            slope = second - offset
            mean, variance = slope * mean + offset, slope**2 * variance + std**2
        torch.testing.assert_close(mean, torch.tensor(m, dtype=torch.float64), rtol=1e-5, atol=1e-5)
        return float(variance)

    errors = [abs(final_variance(num_steps) - d**2) for num_steps in (50, 200, 800)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.02 * d**2


def test_for_small_steps_the_noise_is_flow_grpo_s() -> None:
    """Flow-GRPO's σ_t·√Δ with σ_t = a·√(t / (1 − t)) and a = √2·η."""
    ours, eta = sampler(1000), 0.5
    for k in (300, 600, 900):
        now, later = ours.sigmas[k].double(), ours.sigmas[k + 1].double()
        _, std = ours.transition(k, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), eta=eta)
        expected = 2**0.5 * eta * (now / (1 - now)).sqrt() * (now - later).sqrt()
        torch.testing.assert_close(std, expected, rtol=0.02, atol=0)


def test_a_drawn_step_is_the_forward_process_s_posterior_with_all_the_noise() -> None:
    """η = 1: the variance of q(x_t' | x_t, x0) of the flow's Markov chain, by Bayes' rule."""
    ours, k = sampler(10), 4
    now, later = ours.sigmas[k].double(), ours.sigmas[k + 1].double()
    ratio = (1 - now) / (1 - later)
    step_variance = now**2 - ratio**2 * later**2
    precision = ratio**2 / step_variance + 1 / later**2
    _, std = ours.transition(k, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), eta=1.0)
    torch.testing.assert_close(std, precision**-0.5, rtol=1e-9, atol=0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"eta: 1.2; a flow's steps allow 0"):
        sampler(4).transition(0, torch.zeros(1), torch.zeros(1), eta=1.2)
    with pytest.raises(UserError, match="DDIMScheduler, has no shift"):
        flow_scheduler({"_class_name": "DDIMScheduler"})


def test_without_data_the_noise_levels_are_known() -> None:
    assert torch.equal(FlowSampler(SD3, 5, torch.device("meta"), image_tokens=16).t, sampler(5).t)
