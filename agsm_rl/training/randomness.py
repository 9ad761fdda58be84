"""Randomness by counting: every number is fixed by (seed, name, step, row), so there is no generator state to lose.

A resumed run, a run on more processes and a run in smaller chunks therefore see the same noise.
"""

import zlib

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, name: str, *counters: int) -> np.random.Generator:
    """A NumPy generator fixed by its arguments (counters are non-negative)."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode()), *counters]))


class Draw:
    """The random numbers of one term (or source) in one step; noise levels lie in `t_range` within [0, 1]."""

    def __init__(
        self, seed: int = 0, name: str = "", step: int = 0, *, t_range: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self.seed, self.name, self.step, self.t_range = seed, name, step, t_range

    def noise_like(self, latents: Tensor, rows: Tensor, *, purpose: str = "noise") -> Tensor:
        """Standard normal noise of the shape of `latents` [B, ...]; row i depends on its number rows[i] alone."""
        if latents.is_meta:
            return torch.empty_like(latents)  # a rehearsal needs no numbers
        noise = torch.empty(latents.shape, dtype=torch.float32)
        for index, row in enumerate(rows.tolist()):
            seed = int(stream(self.seed, f"{self.name}/{purpose}", self.step, row).integers(2**63))
            noise[index].normal_(generator=torch.Generator().manual_seed(seed))
        return noise.to(latents)

    def shared_t(self, count: int, device: torch.device | None = None) -> Tensor:
        """One noise level for the whole step, uniform in `t_range`, as [count]."""
        share = float(stream(self.seed, f"{self.name}/t", self.step).random())
        return self._scale(torch.full((count,), share, device=device))

    def t(self, rows: Tensor, device: torch.device | None = None, *, purpose: str = "t") -> Tensor:
        """One noise level per row, uniform in `t_range`; row i depends on its number rows[i] alone."""
        return self._scale(self.uniform(rows, purpose=purpose).to(device))

    def uniform(self, rows: Tensor, *, purpose: str) -> Tensor:
        """One number in [0, 1) per row, [B] on the CPU; row i depends on its number rows[i] alone."""
        names = [(self.seed, f"{self.name}/{purpose}", self.step, row) for row in rows.tolist()]
        return torch.tensor([float(stream(*name).random()) for name in names])

    def _scale(self, share: Tensor) -> Tensor:
        low, high = self.t_range
        return (low + share * (high - low)).clamp(max=1 - 1e-6)
