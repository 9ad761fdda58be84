"""The optimizers by name: what a recipe's `optimizer: {use: …}` and the trainer's `optimizer` choose from.

Each is a dataclass of its own options, beside those that all have (learning rate, weight decay, betas). Packages that
are not always there are imported when a run asks for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

log = logging.getLogger(__name__)
Groups = list[dict[str, Any]]
"""A group for each trained adapter: `params`, a list of parameters, and `lr`, their learning rate."""
Betas = tuple[float, float]
DEFAULT_BETAS: Betas = (0.9, 0.999)


class NamedOptimizer:
    """Base of the optimizers below: their defaults, and what the trainer asks of them."""

    default_rate: ClassVar[float] = 1e-3
    """The learning rate where none is given."""
    runs_on_meta: ClassVar[bool] = True
    """Whether its step runs on tensors without data, so that its memory can be rehearsed."""
    takes_betas: ClassVar[bool] = True
    one_rate: ClassVar[bool] = False
    """Whether all adapters must have the same learning rate."""

    def check(self, rates: Iterable[float], betas: Betas) -> None:
        """UserError where it cannot do with the options that all optimizers have."""
        if self.one_rate and len(set(rates)) > 1:
            raise UserError(
                f"learning_rate: {type(self).__name__} adapts one step size for all parameters, so all adapters must "
                "have the same rate; give one number"
            )
        if not self.takes_betas and tuple(betas) != DEFAULT_BETAS:
            raise UserError(f"betas: {type(self).__name__} has none; leave them out")

    def state_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Bytes that its state takes after the first step; by default two tensors like each parameter."""
        return sum(2 * parameter.nbytes for parameter in parameters)

    def make(self, groups: Groups, *, weight_decay: float, betas: Betas) -> torch.optim.Optimizer:
        """The optimizer over these groups; UserError where its package is not installed."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(NamedOptimizer):
    """torch.optim.AdamW.

    Args:
        eps: Added to the denominator.
        fused: One kernel for the whole step. Null: on a GPU.
    """

    eps: float = 1e-8
    fused: bool | None = None

    def make(self, groups: Groups, *, weight_decay: float, betas: Betas) -> torch.optim.Optimizer:
        """The optimizer over these groups."""
        fused, devices = self.fused, {parameter.device.type for group in groups for parameter in group["params"]}
        if fused is None and devices == {"cuda"}:
            fused = True
        if devices == {"meta"}:
            fused = None  # there is no such kernel for a rehearsal, which needs none
        return torch.optim.AdamW(groups, weight_decay=weight_decay, betas=betas, eps=self.eps, fused=fused)


@dataclass(frozen=True)
class AdamW8bit(NamedOptimizer):
    """AdamW whose averages are kept in 8 bits, from bitsandbytes: a quarter of AdamW's state.

    Args:
        eps: Added to the denominator.
        min_8bit_size: Parameters with fewer elements keep their averages in 32 bits.
    """

    runs_on_meta: ClassVar[bool] = False
    eps: float = 1e-8
    min_8bit_size: int = 4096

    def state_bytes(self, parameters: Sequence[Tensor]) -> int:
        """A byte per element and average, a number per block of 256, and the two tables of what a byte means."""
        large = [p.numel() for p in parameters if p.numel() >= self.min_8bit_size]
        small = [p.numel() for p in parameters if p.numel() < self.min_8bit_size]
        tables = 2 * 256 * 4 if large else 0
        return sum(2 * count + 2 * 4 * -(-count // 256) for count in large) + sum(8 * count for count in small) + tables

    def make(self, groups: Groups, *, weight_decay: float, betas: Betas) -> torch.optim.Optimizer:
        """The optimizer over these groups; UserError where bitsandbytes is not installed."""
        try:
            from bitsandbytes.optim import AdamW8bit as Optimizer
        except ImportError as error:
            raise _not_installed("adamw_8bit", "bitsandbytes") from error
        made: torch.optim.Optimizer = Optimizer(
            groups, weight_decay=weight_decay, betas=betas, eps=self.eps, min_8bit_size=self.min_8bit_size
        )
        return made


@dataclass(frozen=True)
class Prodigy(NamedOptimizer):
    """Prodigy (arXiv 2306.06101) from prodigyopt: it finds its own step size, and `learning_rate` is a factor of it.

    The default rate is its authors' 1. The metric `learning_rate` is the rate in use: the factor times the estimate d.

    Args:
        beta3: Decay of the averages by which d is estimated. Null: √β₂.
        eps: Added to the denominator.
        use_bias_correction: Correct the averages' bias, as Adam does.
        safeguard_warmup: Keep the schedule's warm-up out of the estimate of d; for schedules with `warmup_steps`.
        d0: First estimate of d.
        d_coef: Factor of the estimate; its authors advise to change this one, not the rate.
        growth_rate: d grows at most by this factor per step. Null: without a bound.
        slice_p: Estimate d from every `slice_p`-th element; above 1 it saves memory.
    """

    default_rate: ClassVar[float] = 1.0
    one_rate: ClassVar[bool] = True
    beta3: float | None = None
    eps: float = 1e-8
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float | None = None
    slice_p: int = 1

    def state_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Adam's two averages, and two of every `slice_p`-th element: where it began, and the sum of its gradients.

        The beginning of a parameter that begins at 0 (a LoRA's B) is not kept; it is counted all the same.
        """
        sliced = sum(2 * -(-p.numel() // self.slice_p) * p.element_size() for p in parameters)
        return super().state_bytes(parameters) + sliced

    def make(self, groups: Groups, *, weight_decay: float, betas: Betas) -> torch.optim.Optimizer:
        """The optimizer over these groups; UserError where prodigyopt is not installed."""
        try:
            from prodigyopt import Prodigy as Optimizer
        except ImportError as error:
            raise _not_installed("prodigy", "prodigyopt") from error
        made: torch.optim.Optimizer = Optimizer(
            groups,
            weight_decay=weight_decay,
            betas=betas,
            beta3=self.beta3,
            eps=self.eps,
            use_bias_correction=self.use_bias_correction,
            safeguard_warmup=self.safeguard_warmup,
            d0=self.d0,
            d_coef=self.d_coef,
            growth_rate=float("inf") if self.growth_rate is None else self.growth_rate,
            slice_p=self.slice_p,
        )
        return made


@dataclass(frozen=True)
class Adafactor(NamedOptimizer):
    """torch.optim.Adafactor (arXiv 1804.04235): rows and columns of squares in place of all of them; no averages.

    It takes no `betas`.

    Args:
        beta2_decay: Exponent by which the average of the squares lengthens over the steps.
        eps: Two numbers: added to the squares (null: by the precision), and the least scale of a parameter.
        d: Updates whose root mean square is above this are scaled down to it.
    """

    takes_betas: ClassVar[bool] = False
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0

    def state_bytes(self, parameters: Sequence[Tensor]) -> int:
        """A number per row and per column of a matrix, or of each in a stack; a vector's squares are all kept."""
        return sum(
            p.element_size() * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel())
            for p in parameters
        )

    def make(self, groups: Groups, *, weight_decay: float, betas: Betas) -> torch.optim.Optimizer:
        """The optimizer over these groups."""
        first, second = self.eps
        return torch.optim.Adafactor(
            groups, weight_decay=weight_decay, beta2_decay=self.beta2_decay, eps=(first, second), d=self.d
        )


@dataclass(frozen=True)
class Muon(NamedOptimizer):
    """torch.optim.Muon for parameters of two dimensions (a LoRA's matrices), and AdamW for all others.

    Both have the same learning rate and weight decay; `betas` are those of AdamW. A message says which parameters
    AdamW trains.

    Args:
        momentum: Decay of the average of the gradient.
        nesterov: Nesterov's momentum.
        ns_steps: Newton-Schulz iterations, which make the update orthogonal.
        adjust_lr_fn: How the rate is fitted to a matrix: `match_rms_adamw`, so that AdamW's rates fit; or `original`,
            torch's default.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"

    def state_bytes(self, parameters: Sequence[Tensor]) -> int:
        """A matrix's momentum, and AdamW's two averages of all others."""
        return sum(parameter.nbytes * (1 if parameter.ndim == 2 else 2) for parameter in parameters)

    def make(self, groups: Groups, *, weight_decay: float, betas: Betas) -> torch.optim.Optimizer:
        """The two optimizers over these groups, as one."""
        matrices = [group | {"params": [p for p in group["params"] if p.ndim == 2]} for group in groups]
        others = [group | {"params": [p for p in group["params"] if p.ndim != 2]} for group in groups]
        matrices, others = ([group for group in split if group["params"]] for split in (matrices, others))
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(
                torch.optim.Muon(
                    matrices,
                    weight_decay=weight_decay,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    ns_steps=self.ns_steps,
                    adjust_lr_fn=self.adjust_lr_fn,
                )
            )
        if others:
            parts.append(AdamW().make(others, weight_decay=weight_decay, betas=betas))
            number = sum(len(group["params"]) for group in others)
            rest = sum(len(group["params"]) for group in matrices)
            log.warning(
                "optimizer: Muon trains parameters of two dimensions only: %d of them here; AdamW trains the other %d",
                rest,
                number,
            )
        return parts[0] if len(parts) == 1 else SeveralOptimizers(parts)


class SeveralOptimizers(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, that step together."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The groups and the state are the parts' own, so that a rate that is set here holds there."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state.clear()
        for part in self.parts:
            self.state.update(part.state)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of each part."""
        for part in self.parts:
            part.step()
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError where it is another optimizer's."""
        states = state_dict.get("parts", [])
        if len(states) != len(self.parts):
            raise ValueError("the optimizer's state is that of another optimizer")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._share()


OPTIMIZERS: dict[str, type[NamedOptimizer]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "prodigy": Prodigy,
    "adafactor": Adafactor,
    "muon": Muon,
}


def find_kind(kinds: Mapping[str, Any], name: str, where: str) -> Any:
    """The class of this name in `OPTIMIZERS` or `SCHEDULES`; UserError where there is none."""
    if name not in kinds:
        what = "an optimizer" if kinds is OPTIMIZERS else "a schedule"
        raise unknown_name(f"{where}.use", name, what, kinds)
    return kinds[name]


def chosen(kinds: Mapping[str, Any], given: str | Mapping[str, Any], where: str) -> Any:
    """The optimizer or schedule of `name` or `{use: name, options…}`; UserError for unknown names and options.

    A recipe's options have been checked before, with their types.
    """
    options = {"use": given} if isinstance(given, str) else dict(given)
    kind = find_kind(kinds, str(options.pop("use", next(iter(kinds)))), where)
    for key in options:
        if key not in kind.__dataclass_fields__:
            raise unknown_name(where, key, f"an option of {kind.__name__}", kind.__dataclass_fields__)
    return kind(**options)


def floating_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors of a parameter's state that could become infinite, by their names; the count of steps is left out."""
    state = optimizer.state.get(parameter, {})
    return {
        key: value
        for key, value in state.items()
        if key != "step" and isinstance(value, Tensor) and value.is_floating_point()
    }


def _not_installed(name: str, package: str) -> UserError:
    return UserError(f"optimizer.use: '{name}' needs {package}, which is not installed; run `pip install {package}`")
