"""What all pure losses share: their precision is the inputs', and at least single; `own` may be of any integer type."""

import pytest
import torch

from agsm_rl.objectives.agsm import guided_score_loss
from agsm_rl.objectives.ddpo import clipped_policy_loss
from agsm_rl.objectives.diffusion_dpo import diffusion_dpo_loss
from agsm_rl.objectives.diffusion_nft import nft_loss
from agsm_rl.objectives.softrepa import softrepa_loss
from agsm_rl.objectives.spo import spo_loss

OWN = torch.tensor([0, 2, 1])


def grid(generator):
    return torch.randn(3, 3, 1, 2, 2, generator=generator, dtype=torch.float64)


def images(generator):
    return torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)


def numbers(generator):
    return torch.rand(3, generator=generator, dtype=torch.float64)


# name: the loss of what learns and the rest, what learns, the rest
LOSSES = {
    "agsm": (lambda live, *rest: guided_score_loss(live, *rest, own=OWN, temperature=1.0), grid, [grid, images]),
    "bradley_terry": (
        lambda live, *rest: guided_score_loss(live, *rest, own=OWN, preference="bradley_terry"),
        grid,
        [grid, images],
    ),
    "softrepa": (lambda live, *rest: softrepa_loss(live, *rest, own=OWN), grid, [images]),
    "ddpo": (lambda live, *rest: clipped_policy_loss(live, *rest, clip_range=10.0), numbers, [numbers, numbers]),
    "diffusion_dpo": (lambda live, *rest: diffusion_dpo_loss(live, *rest, beta=2.0), numbers, [numbers] * 3),
    "spo": (lambda live, *rest: spo_loss(live, *rest, clip_range=0.99), numbers, [numbers] * 3),
    "diffusion_nft": (lambda live, *rest: nft_loss(live, *rest, beta=0.5), images, [images, images, numbers]),
}


@pytest.fixture(params=LOSSES)
def made(request):
    loss, learning, rest = LOSSES[request.param]
    generator = torch.Generator().manual_seed(0)
    return loss, learning(generator), [make(generator) for make in rest]


def test_in_double_precision_the_gradient_is_that_of_finite_differences(made):
    loss, live, rest = made
    assert torch.autograd.gradcheck(lambda one: loss(one, *rest)[0], live.requires_grad_())


def test_half_precision_is_computed_in_single(made):
    loss, live, rest = made
    half = [one.bfloat16() for one in (live, *rest)]
    found, metrics = loss(*half)
    assert found.dtype == torch.float32
    expected, _ = loss(*(one.float() for one in half))
    torch.testing.assert_close(found, expected)
    assert all(metric.ndim == 0 for metric in metrics.values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_own_columns_are_of_any_integer_type(dtype):
    generator = torch.Generator().manual_seed(0)
    live, ema, target = grid(generator), grid(generator), images(generator)
    for loss, arguments in ((guided_score_loss, (live, ema, target)), (softrepa_loss, (live, target))):
        found, _ = loss(*arguments, own=OWN.to(dtype))
        assert found == loss(*arguments, own=OWN)[0]


def test_shapes_that_would_be_spread_over_each_other_are_refused():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"reward: got the shape \(3, 1\)"):
        nft_loss(images(generator), images(generator), images(generator), numbers(generator)[:, None])
    with pytest.raises(ValueError, match=r"shapes \(3,\), \(3,\), \(3, 1\) must broadcast"):
        clipped_policy_loss(numbers(generator), numbers(generator), numbers(generator)[:, None])
