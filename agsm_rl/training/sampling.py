"""Drawing from a policy and the probability of what was drawn: shared by rollouts and policy-gradient objectives."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agsm_rl.interfaces import Cond, Sampler

Predict = Callable[[Tensor, Tensor, Cond], Tensor]

DDIM = "ddim"
"""The form of noise that every sampler has."""


def noises_of(sampler: Sampler) -> tuple[str, ...]:
    """The forms of noise that a sampler's steps can have, its default first."""
    return getattr(sampler, "noises", (DDIM,))


def transition(
    sampler: Sampler, k: int, x_t: Tensor, prediction: Tensor, *, eta: float, noise: str = DDIM
) -> tuple[Tensor, Tensor]:
    """The sampler's step k; a sampler with one form of noise need not know its name."""
    options = {} if noise == DDIM else {"noise": noise}
    return sampler.transition(k, x_t, prediction, eta=eta, **options)


def guided(
    predict: Predict, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, scale: float, *, detach_uncond: bool = False
) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): uncond + scale · (cond − uncond), both branches in one batch.

    `uncond` has one row. A policy's adapters may predict that branch with ψ⁻ (training/guidance.py). Scale 1 is the
    conditional branch alone and costs half. `detach_uncond`: gradients flow through the conditional branch alone, and
    nothing is computed or held for those of the other. A model whose pipeline guides in another way says so in
    `uncond.combine`.
    """
    if scale == 1:
        return predict(x_t, t, cond)
    without_prompt = uncond.expand(len(cond)).of_pictures(cond)
    both = Cond.cat([without_prompt, cond])
    both = replace(both, unconditional_first=True, unconditional_detached=detach_uncond)
    without, with_prompt = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    if detach_uncond:
        without = without.detach()
    if uncond.combine is not None:
        return uncond.combine(without, with_prompt, scale, t)
    return without + scale * (with_prompt - without)


def step_distribution(
    predict: Predict,
    sampler: Sampler,
    k: int,
    x_t: Tensor,
    cond: Cond,
    uncond: Cond,
    *,
    guidance: float,
    eta: float,
    noise: str = DDIM,
    detach_uncond: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and standard deviation (0-d) of the sampler's step k from x_t [B, C, h, w]."""
    t = sampler.t[k].to(x_t.device).expand(len(x_t))
    prediction = guided(predict, x_t, t, cond, uncond, guidance, detach_uncond=detach_uncond)
    return transition(sampler, k, x_t, prediction, eta=eta, noise=noise)


def step_distributions(
    predict: Predict,
    sampler: Sampler,
    steps: Sequence[int],
    states: Tensor,
    cond: Cond,
    uncond: Cond,
    *,
    guidance: float,
    eta: float,
    noise: str = DDIM,
    detach_uncond: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """`step_distribution` of several steps in one prediction; `states` [B, S, C, h, w] are where each begins."""
    count, rows = len(steps), states.flatten(0, 1)
    t = torch.stack([sampler.t[k] for k in steps]).to(states.device).repeat(len(states))
    each = cond if count == 1 else cond[torch.arange(len(cond)).repeat_interleave(count)]
    predictions = guided(predict, rows, t, each, uncond, guidance, detach_uncond=detach_uncond).unflatten(
        0, (-1, count)
    )
    return [
        transition(sampler, k, states[:, place], predictions[:, place], eta=eta, noise=noise)
        for place, k in enumerate(steps)
    ]


def has_noise(sampler: Sampler, k: int, *, eta: float, noise: str = DDIM) -> bool:
    """Whether step k is random: its standard deviation is above 0."""
    nothing = torch.zeros(1, 1, 1, 1)
    return bool(transition(sampler, k, nothing, nothing, eta=eta, noise=noise)[1] > 0)


def log_density(x: Tensor, mean: Tensor, std: Tensor, *, noise: str = DDIM) -> Tensor:
    """log π of a step, up to a constant, averaged over the elements of each row, [B].

    It is `gaussian_log_prob`; for `cps` as published (arXiv 2509.05952) it is −(x − mean)², without 1/(2·std²), so that
    all steps pull with like strength, whatever their noise.
    """
    if noise == "cps" and std > 0:
        return -((x.float() - mean.float()) ** 2).flatten(1).mean(1)
    return gaussian_log_prob(x, mean, std)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²) averaged (not summed) over the elements of each row, [B]; x and mean [B, ...], std 0-d.

    The mean over elements is DDPO's convention (arXiv 2305.13301): a clip range then means the same at any resolution.
    A step without noise (std 0) is deterministic: its log-probability is 0.
    """
    if std == 0:
        return torch.zeros(len(x), device=x.device) + 0 * mean.float().flatten(1).sum(1)
    std = std.float()
    log_prob = -((x.float() - mean.float()) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)
