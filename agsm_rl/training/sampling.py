"""Drawing from a policy and the probability of what was drawn: shared by rollouts and policy-gradient objectives."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agsm_rl.interfaces import Cond, Sampler

Predict = Callable[[Tensor, Tensor, Cond], Tensor]


class KeptGraph:
    """The distributions of `steps` as a draw came to them, with the graph to the parameters, for the first who asks.

    A backward pass goes through a graph once; who asks after the first computes the distribution anew.
    """

    def __init__(self, rows: Tensor, steps: Sequence[int]) -> None:
        self._first, self._wanted = int(rows[0]), steps
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, k: int, mean: Tensor, std: Tensor) -> None:
        """Keep step k, if it is wanted, of the rows that come next: mean [b, C, h, w], standard deviation (0-d)."""
        if k in self._wanted:
            self._steps.setdefault(k, []).append((mean, std))

    def holds(self, steps: Sequence[int]) -> bool:
        """Whether nobody has asked for any of these steps."""
        return all(k in self._steps for k in steps)

    def take(self, steps: Sequence[int], rows: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Means [B, C, h, w] and standard deviations (0-d) of the steps, for rows by their numbers; each only once."""
        if not self.holds(steps):
            return None
        found = []
        for k in steps:
            parts = self._steps.pop(k)
            mean = parts[0][0] if len(parts) == 1 else torch.cat([mean for mean, _ in parts])
            found.append((mean[rows.to(mean.device) - self._first], parts[0][1]))
        return found


def guided(predict: Predict, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): uncond + scale · (cond − uncond), both branches in one batch.

    `uncond` has one row. Scale 1 is the conditional branch alone and costs half.
    """
    if scale == 1:
        return predict(x_t, t, cond)
    both = Cond.cat([uncond.expand(len(cond)), cond])
    without, with_prompt = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return without + scale * (with_prompt - without)


def step_distribution(
    predict: Predict, sampler: Sampler, k: int, x_t: Tensor, cond: Cond, uncond: Cond, *, guidance: float, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and standard deviation (0-d) of the sampler's step k from x_t [B, C, h, w]."""
    t = sampler.t[k].to(x_t.device).expand(len(x_t))
    prediction = guided(predict, x_t, t, cond, uncond, guidance)
    return sampler.transition(k, x_t, prediction, eta=eta)


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
) -> list[tuple[Tensor, Tensor]]:
    """`step_distribution` of several steps in one prediction; `states` [B, S, C, h, w] are where each begins."""
    count, rows = len(steps), states.flatten(0, 1)
    t = torch.stack([sampler.t[k] for k in steps]).to(states.device).repeat(len(states))
    each = cond if count == 1 else cond[torch.arange(len(cond)).repeat_interleave(count)]
    predictions = guided(predict, rows, t, each, uncond, guidance).unflatten(0, (-1, count))
    return [sampler.transition(k, states[:, place], predictions[:, place], eta=eta) for place, k in enumerate(steps)]


def noisy_steps(sampler: Sampler, num_steps: int, *, eta: float) -> tuple[int, ...]:
    """The steps that leave something to chance (standard deviation above 0), of all `num_steps`."""
    nothing = torch.zeros(1, 1, 1, 1)
    return tuple(k for k in range(num_steps) if sampler.transition(k, nothing, nothing, eta=eta)[1] > 0)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²) averaged (not summed) over the elements of each row, [B]; x and mean [B, ...], std 0-d.

    The mean over elements is DDPO's convention (arXiv 2305.13301): a clip range then means the same at any resolution.
    A step without noise (std 0) leaves nothing to chance: its log-probability is 0.
    """
    if std == 0:
        return torch.zeros(len(x), device=x.device) + 0 * mean.float().flatten(1).sum(1)
    std = std.float()
    log_prob = -((x.float() - mean.float()) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)
