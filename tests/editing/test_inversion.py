"""Inversion undoes a sampler's steps; drawing from what it gives returns the image, more exactly with more steps."""

import pytest
import torch
from diffusers import DDIMInverseScheduler

from agsm_rl.backbones.ddim import DDIMSampler
from agsm_rl.backbones.flow import FlowSampler
from agsm_rl.editing.editor import EditSettings, edit_latents
from agsm_rl.editing.inversion import invert, redraw, step_coefficients

CPU = torch.device("cpu")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SAMPLERS = {
    "epsilon": lambda steps: DDIMSampler(BETAS | {"prediction_type": "epsilon"}, steps, CPU),
    "v_prediction": lambda steps: DDIMSampler(BETAS | {"prediction_type": "v_prediction"}, steps, CPU),
    "zero terminal SNR": lambda steps: DDIMSampler(
        BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        steps,
        CPU,
    ),
    "flow": lambda steps: FlowSampler({"shift": 3.0}, steps, CPU, image_tokens=16),
}


def latents_of(shape, count=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def error_of(drawn, latents):
    return float((drawn - latents).norm() / latents.norm())


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("num_steps", [7, 20])
def test_with_the_predictions_of_the_way_back_every_step_is_undone_exactly(kind, num_steps):
    """A model that predicts the same at both ends of a step, here a constant, is inverted without any error."""
    sampler, latents = SAMPLERS[kind](num_steps), latents_of((4, 8, 8))
    constant = latents_of((4, 8, 8)).flip(-1)
    noise = invert(lambda x, t: constant, sampler, latents)
    assert error_of(noise, latents) > 0.1
    torch.testing.assert_close(redraw(lambda x, t: constant, sampler, noise), latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_steps_two_coefficients_are_the_whole_step(kind):
    sampler = SAMPLERS[kind](10)
    x, prediction = latents_of((4, 8, 8)), latents_of((4, 8, 8)).flip(-1)
    for k in range(10):
        kept, moved = step_coefficients(sampler, k)
        mean, _ = sampler.transition(k, x, prediction, eta=0.0)
        torch.testing.assert_close(kept * x + moved * prediction, mean, rtol=1e-5, atol=1e-5)


TOLERANCE = {5: 0.08, 20: 0.02}
"""The largest relative error of reconstructed latents, by the number of steps."""


def test_more_steps_give_the_image_back_more_exactly(each_backbone):
    prompt, latents = ["two blue circles"], latents_of(each_backbone.latent_shape)
    errors = {}
    for num_steps in TOLERANCE:
        settings = EditSettings(method="inversion", num_steps=num_steps, strength=0.4, guidance=1.0)
        errors[num_steps] = error_of(
            edit_latents(each_backbone, latents, prompt, prompt, seeds=[0], settings=settings), latents
        )
    assert all(error < TOLERANCE[num_steps] for num_steps, error in errors.items()), errors
    assert errors[20] < 0.6 * errors[5]


def test_it_is_the_inversion_of_diffusers(backbone):
    inverse = DDIMInverseScheduler.from_config(backbone.pipeline.scheduler.config, clip_sample=False)
    inverse.set_timesteps(5)
    sampler, cond = backbone.sampler(5), backbone.encode_text(["a red star"])
    expected = latents = latents_of(backbone.latent_shape)
    with torch.no_grad():
        for timestep in inverse.timesteps:
            level = (timestep + 0.5).expand(1) / 1000
            expected = inverse.step(backbone.predict(expected, level, cond), timestep, expected).prev_sample
        found = invert(lambda x, t: backbone.predict(x, t.expand(1), cond), sampler, latents)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
