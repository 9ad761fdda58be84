"""Inversion undoes a sampler's steps; drawing from what it gives returns the image, more exactly with more steps."""

import pytest
import torch
from diffusers import DDIMInverseScheduler

from agsm_rl.editing.editor import EditSettings, edit_latents
from agsm_rl.editing.inversion import invert, redraw, step_coefficients

PROMPT = ["a red star", "two blue circles"]
TOLERANCE = {10: 0.15, 40: 0.03, 160: 0.008}
"""The largest relative error of reconstructed latents, by the number of steps."""


def latents_of(backbone, count=2):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))


def reconstructed(backbone, latents, num_steps):
    settings = EditSettings(method="inversion", num_steps=num_steps, guidance=1.0)
    return edit_latents(backbone, latents, PROMPT, PROMPT, seeds=[0, 1], settings=settings)


def test_more_steps_give_the_image_back_more_exactly(each_backbone):
    latents = latents_of(each_backbone)
    errors = {}
    for num_steps in TOLERANCE:
        errors[num_steps] = float((reconstructed(each_backbone, latents, num_steps) - latents).norm() / latents.norm())
    print(errors)
    assert all(error < TOLERANCE[num_steps] for num_steps, error in errors.items())
    assert errors[10] > 2 * errors[40] > 4 * errors[160]
