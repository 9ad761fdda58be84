"""FlowEdit (arXiv 2412.08629): edit with a flow model, from the source image straight to the edited one.

An edit is an ODE between images. At noise level σ the source is hidden under fresh noise, x_src = (1 − σ)·z + σ·noise,
and the image as edited so far under the same noise, x_tar = x_src + d. The difference d begins at 0 and moves by
    d ← d + (σ' − σ) · mean over n_avg noises of ( v(x_tar | target prompt) − v(x_src | source prompt) ).
Only the last `n_max` of the steps are taken: fewer keep more of the source. In the last `n_min` of them the image is
drawn in the ordinary way, from under noise and under the target prompt alone (SDEdit, arXiv 2108.01073).

The authors keep z + d where d is kept here, which rounds differently: with d, equal prompts and guidances give the
source back bit for bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from agsm_rl.editing.inversion import PredictAt
from agsm_rl.errors import UserError

Noise = Callable[[int, int], Tensor]
"""`noise(k, n)` → standard normal noise [B, C, h, w], the n-th of step k."""


def flow_edit(
    predict_source: PredictAt,
    predict_target: PredictAt,
    latents: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    n_max: int,
    n_min: int = 0,
    n_avg: int = 1,
) -> Tensor:
    """The edited latents [B, C, h, w] of the source `latents`.

    Args:
        predict_source: The flow v under the source prompt, with its guidance.
        predict_target: The same under the target prompt.
        latents: The source image's latents [B, C, h, w].
        sigmas: The K + 1 noise levels of K steps, descending, the last one 0.
        noise: Where fresh noise comes from.
        n_max: Steps that are taken, in [1, K]. Published for SD3: 33 of 50.
        n_min: Those of them, at the end, that draw in the ordinary way, in [0, n_max]. Published: 0.
        n_avg: Noises a step averages over, 1 or more. Published: 1.

    Raises UserError for numbers outside these ranges.
    """
    steps = len(sigmas) - 1
    check_steps(steps, n_max=n_max, n_min=n_min, n_avg=n_avg)
    difference = torch.zeros_like(latents)
    for k in range(steps - n_max, steps - n_min):
        change = torch.zeros_like(latents)
        for n in range(n_avg):
            x_src = (1 - sigmas[k]) * latents + sigmas[k] * noise(k, n)
            change += (predict_target(x_src + difference, sigmas[k]) - predict_source(x_src, sigmas[k])) / n_avg
        difference = difference + (sigmas[k + 1] - sigmas[k]) * change
    if n_min == 0:
        return latents + difference
    first = steps - n_min
    x = (1 - sigmas[first]) * latents + sigmas[first] * noise(first, 0) + difference
    for k in range(first, steps):
        x = x + (sigmas[k + 1] - sigmas[k]) * predict_target(x, sigmas[k])
    return x


def check_steps(num_steps: int, *, n_max: int, n_min: int, n_avg: int) -> None:
    """UserError unless 0 ≤ n_min ≤ n_max ≤ num_steps, 1 ≤ n_max and 1 ≤ n_avg."""
    if not 1 <= n_max <= num_steps:
        raise UserError(
            f"n_max: got {n_max}; of {num_steps} steps, 1 to {num_steps} can be taken (published: 33 of 50)"
        )
    if not 0 <= n_min <= n_max:
        raise UserError(f"n_min: got {n_min}; 0 to n_max, which is {n_max}, is allowed (published: 0)")
    if n_avg < 1:
        raise UserError(f"n_avg: got {n_avg}; it must be 1 or more (published: 1)")
