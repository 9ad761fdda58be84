"""The denoiser's optimizer: AdamW for all of it, or Muon for a transformer's matrices and AdamW for the rest.

Muon (Keller Jordan, 2024) turns each matrix's momentum into the nearest orthogonal one. On the scenes world's SD3 it
reached in equal time what AdamW did not (docs/scenes.md).
"""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from torch.optim import _muon

from agsm_rl.training.precision import is_slow

WARMUP = 300


class Optimization:
    """Optimizers with a cosine schedule each, that are stepped and kept together; AdamW also trains `beside`."""

    def __init__(
        self,
        denoiser: nn.Module,
        steps: int,
        learning_rate: float,
        muon_rate: float | None,
        beside: Iterable[nn.Parameter] = (),
    ) -> None:
        matrices = _matrices(denoiser) if muon_rate is not None else []
        left = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in denoiser.parameters() if id(parameter) not in left] + list(beside)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=learning_rate, weight_decay=1e-3, fused=True)
        ]
        if muon_rate is not None:
            if is_slow(torch.bfloat16, torch.device("cpu")):
                _muon._zeropower_via_newtonschulz = in_float32
            muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        self.schedules = [get_cosine_schedule_with_warmup(part, WARMUP, steps) for part in self.parts]

    def step(self) -> None:
        """One step of all, and of their schedules; the gradients are gone."""
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            part.step()
            schedule.step()
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts."""
        return {"parts": [x.state_dict() for x in self.parts], "schedules": [x.state_dict() for x in self.schedules]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)
        for schedule, kept in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(kept)


def _matrices(denoiser: nn.Module) -> list[nn.Parameter]:
    """The matrices of the transformer blocks' attention and feed-forward layers."""
    named = [(name, parameter) for name, parameter in denoiser.named_parameters() if parameter.ndim == 2]
    return [parameter for name, parameter in named if "blocks." in name and (".attn" in name or ".ff" in name)]


def in_float32(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """torch's Newton-Schulz iteration for Muon, which is always in bfloat16: 3 s a step on a CPU that has none."""
    a, b, c = ns_coefficients
    tall = grad.size(0) > grad.size(1)
    x = grad.T if tall else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
