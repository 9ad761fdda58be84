"""Backward through the frozen network: gradients of activations, never of its weights."""

import pytest
import torch
from profile_step import WeightGradients, backward_work
from torch import nn


def test_no_frozen_weight_gets_a_gradient(policy):
    work = backward_work(policy)
    assert work["calls"] > 0
    assert work["needless"] == 0
    assert work["backward/forward"] < 1.3


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.LayerNorm(5)])
def test_the_count_finds_weights_that_do_get_one(layer):
    image = torch.ones(2, 4, 5, 5, requires_grad=True)
    for frozen in (True, False):
        layer.requires_grad_(not frozen)
        with WeightGradients() as counted:
            layer(image).sum().backward()
        assert (counted.calls, counted.needless) == (1, int(not frozen))
