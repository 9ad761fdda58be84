"""Brightness and sharpness: rewards of pixels, with gradients."""

import torch
from agsm_rl_rewards.brightness import Brightness
from agsm_rl_rewards.sharpness import Sharpness


def test_brightness_is_the_mean_of_an_image():
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.25)])
    torch.testing.assert_close(Brightness()(images, ["", ""]), torch.tensor([0.0, 0.25]))


def test_a_plain_image_has_no_sharpness_and_an_edge_has_some():
    edge = torch.zeros(1, 3, 6, 6)
    edge[..., 3:] = 1.0
    ramp = torch.linspace(0, 1, 6).expand(1, 3, 6, 6)  # a straight ramp has no second derivative
    scores = Sharpness()(torch.cat([edge, ramp, torch.full((1, 3, 6, 6), 0.7)]), ["", "", ""])
    # Of the four inner columns, the two beside the edge have a Laplacian of ±1.
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.0, 0.0]), rtol=0, atol=1e-6)


def test_both_have_gradients_in_every_pixel_that_counts():
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (Brightness()(images, ["", ""]) + Sharpness()(images, ["", ""])).sum().backward()
    assert (images.grad != 0).all()
