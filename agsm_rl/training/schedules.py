"""The learning rate over the steps of a run, by the names of diffusers' `get_scheduler`.

A schedule is a function of the step alone, so there is no state to keep: a resumed run continues with the same rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from agsm_rl.errors import UserError
from agsm_rl.training.optimizers import Betas, NamedOptimizer, chosen

Rate = Callable[[int], float]
"""The learning rate of a step (counted from 0)."""


class Schedule:
    """Base of the schedules below, which take their curve from diffusers."""

    curve: ClassVar[str]
    """Its name in diffusers."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            least = 0 if field.name in ("warmup_steps", "eta_min") else 1
            if field.name != "power" and value < least:
                raise UserError(f"{field.name}: got {value}, but it must be {least} or more")

    def rate(self, highest: float, steps: int) -> Rate:
        """The rate at each step of a run of `steps` steps; `highest` is the recipe's learning rate."""
        from diffusers.optimization import get_scheduler

        options = {"num_warmup_steps" if name == "warmup_steps" else name: value for name, value in vars(self).items()}
        scheduler = get_scheduler(
            self.curve,
            torch.optim.SGD([torch.zeros(1)], lr=highest),
            num_training_steps=max(steps, 1),
            **({"num_warmup_steps": 0} | options),
        )
        (factor,) = scheduler.lr_lambdas
        return lambda step: highest * factor(step)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate throughout, after a warm-up where one is asked for.

    Args:
        warmup_steps: The rate rises linearly from 0 over so many steps.
    """

    curve: ClassVar[str] = "constant_with_warmup"
    warmup_steps: int = 0

    def rate(self, highest: float, steps: int) -> Rate:
        """The rate at each step."""
        return super().rate(highest, steps) if self.warmup_steps else lambda step: highest


@dataclass(frozen=True)
class Linear(Schedule):
    """From the learning rate down to 0 at the end of the run, along a line.

    Args:
        warmup_steps: Before that, the rate rises linearly from 0 over so many steps.
    """

    curve: ClassVar[str] = "linear"
    warmup_steps: int = 0


@dataclass(frozen=True)
class Cosine(Schedule):
    """From the learning rate down to 0 at the end of the run, along half a cosine wave.

    Args:
        warmup_steps: Before that, the rate rises linearly from 0 over so many steps.
    """

    curve: ClassVar[str] = "cosine"
    warmup_steps: int = 0


@dataclass(frozen=True)
class CosineWithRestarts(Schedule):
    """`cosine`, several times over the run: each cycle begins at the learning rate again.

    Args:
        warmup_steps: Before that, the rate rises linearly from 0 over so many steps.
        num_cycles: Number of cycles in the run.
    """

    curve: ClassVar[str] = "cosine_with_restarts"
    warmup_steps: int = 0
    num_cycles: int = 1


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From the learning rate down to 1e-7 at the end of the run, along a power of the steps that are left.

    Args:
        warmup_steps: Before that, the rate rises linearly from 0 over so many steps.
        power: The power; 1 is a line.
    """

    curve: ClassVar[str] = "polynomial"
    warmup_steps: int = 0
    power: float = 1.0

    def rate(self, highest: float, steps: int) -> Rate:
        """The rate at each step."""
        if highest <= 1e-7:
            raise UserError(f"learning_rate: {highest}, but `polynomial` ends at 1e-7 and must begin above it")
        return super().rate(highest, steps)


@dataclass(frozen=True)
class CosineWarmRestarts(Schedule):
    """torch's CosineAnnealingWarmRestarts, as AGSM's released scripts have it: the length of a cycle is in steps.

    Args:
        T_0: Length of the first cycle, in units of `every` steps.
        T_mult: Each further cycle is so many times as long as the one before.
        eta_min: The rate at the end of a cycle.
        every: The rate changes every so many steps. Released: 1000 (SDXL: 100).
    """

    T_0: int = 10
    T_mult: int = 1
    eta_min: float = 1e-5
    every: int = 1000

    def rate(self, highest: float, steps: int) -> Rate:
        """The rate at each step."""

        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            torch.optim.SGD([torch.zeros(1)], lr=highest), self.T_0, self.T_mult, self.eta_min
        )

        def rate(step: int) -> float:
            scheduler.step(step // self.every)
            return float(scheduler.get_last_lr()[0])

        return rate


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "polynomial": Polynomial,
    "cosine_warm_restarts": CosineWarmRestarts,
}


class LearningRates:
    """The learning rate of each adapter over a run, after a schedule.

    `given` is one rate, or one for each of the `trained` adapters by its name.
    """

    def __init__(
        self,
        given: float | Mapping[str, float],
        trained: Sequence[str],
        *,
        schedule: str | Mapping[str, Any] = "constant",
        steps: int,
    ) -> None:
        self.highest = {name: _rate_of(given, name) for name in trained}
        """Each adapter's rate before the schedule."""
        self.by_name = isinstance(given, Mapping)
        curve: Schedule = chosen(SCHEDULES, schedule, "schedule")
        self._curves = {rate: curve.rate(rate, steps) for rate in self.highest.values()}
        self._adapters: list[str] = []
        """The adapter of each of the optimizer's groups."""

    def make(self, kind: NamedOptimizer, policy: Any, *, weight_decay: float, betas: Betas) -> torch.optim.Optimizer:
        """The optimizer over the policy's trained adapters, at these rates."""
        kind.check(self.highest.values(), betas)
        groups = [
            {"params": list(policy.parameters([name]).values()), "lr": rate, "adapter": name}
            for name, rate in self.highest.items()
        ]
        optimizer = kind.make(groups, weight_decay=weight_decay, betas=betas)
        # Not left in the groups, whose content is in checkpoints.
        self._adapters = [group.pop("adapter") for group in optimizer.param_groups]
        return optimizer

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give each of the optimizer's groups the rate of the step (counted from 0)."""
        for adapter, group in zip(self._adapters, optimizer.param_groups, strict=True):
            group["lr"] = self._curves[self.highest[adapter]](step)

    def metrics(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """The rates in use: `learning_rate`, or `learning_rate/<adapter>` where they were given by name."""
        groups = zip(self._adapters, optimizer.param_groups, strict=True)
        # Prodigy's groups have its estimate of the step size, d.
        rates = {adapter: float(group["lr"]) * float(group.get("d", 1.0)) for adapter, group in groups}
        if self.by_name:
            return {f"learning_rate/{name}": rate for name, rate in rates.items()}
        return {"learning_rate": next(iter(rates.values()))}


def _rate_of(learning_rate: float | Mapping[str, float], adapter: str) -> float:
    if not isinstance(learning_rate, Mapping):
        return learning_rate
    if adapter not in learning_rate:
        raise UserError(f"optimizer.learning_rate: it has no rate for the adapter '{adapter}'")
    return learning_rate[adapter]
