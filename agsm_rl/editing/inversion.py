"""Edit by inversion: undo a sampler's steps from an image up to noise, then take them again under another prompt.

A step without noise is linear in the state and the prediction, x' = a·x + b·p, whatever the model predicts. It is
undone by x = (x' − b·p) / a, for which the model would have to predict p at x, which is not known yet. It predicts at
x' and x's noise level instead, as in DDIM inversion (arXiv 2010.02502; diffusers' DDIMInverseScheduler). For a flow
this is Euler's method along its ODE. The smaller the steps, the closer x' is to x, and the more exactly an image is
given back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from agsm_rl.interfaces import Sampler

PredictAt = Callable[[Tensor, Tensor], Tensor]
"""`predict(x [B, C, h, w], t [0-d])` → the prediction [B, C, h, w] that steps are taken by, under a prompt, guided."""


def step_coefficients(sampler: Sampler, k: int) -> tuple[float, float]:
    """a and b of the sampler's step k without noise, x' = a·x + b·prediction."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    none = torch.zeros_like(one)
    kept, _ = sampler.transition(k, one, none, eta=0.0)
    moved, _ = sampler.transition(k, none, one, eta=0.0)
    return kept.item(), moved.item()


def invert(predict: PredictAt, sampler: Sampler, latents: Tensor, *, start: int = 0) -> Tensor:
    """The state [B, C, h, w] before step `start` from which the sampler's steps lead to the finished `latents`.

    Undoes steps K − 1 to `start`; 0 inverts up to noise, K nothing.
    """
    x = latents
    for k in reversed(range(start, len(sampler.t))):
        kept, moved = step_coefficients(sampler, k)
        x = (x - moved * predict(x, sampler.t[k])) / kept
    return x


def redraw(predict: PredictAt, sampler: Sampler, x: Tensor, *, start: int = 0) -> Tensor:
    """The finished latents [B, C, h, w] that the sampler's steps, without noise, draw from `x` before step `start`."""
    for k in range(start, len(sampler.t)):
        x, _ = sampler.transition(k, x, predict(x, sampler.t[k]), eta=0.0)
    return x
