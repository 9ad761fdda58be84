"""What a draw keeps of its steps for the policy gradient that learns from them: their distributions, with the graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from agsm_rl.training.free_memory import free_memory


class Room:
    """Whether a draw's graph fits into a share of the memory that is free: measured at the first step, and remembered.

    weights: those of the denoiser, which the graph only refers to.
    """

    def __init__(self, share: float, weights: nn.Module) -> None:
        self.fits: bool | None = None
        self._share = share
        self._weights = {parameter.data_ptr() for parameter in weights.parameters()}

    @contextmanager
    def measured(self, steps: int, device: torch.device) -> Iterator[None]:
        """Within the block, one of so many steps is computed with its graph."""
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if tensor.device == device and storage.data_ptr() not in self._weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            # Not the tensor itself: an operator that saves its own output would never be freed without a backward pass.
            return tensor.detach().requires_grad_(tensor.requires_grad)

        free = free_memory(device)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.fits = sum(sizes.values()) * steps <= self._share * free


class KeptGraph:
    """The distributions of `steps` as they were drawn, with the graph to the parameters, for the first term that asks.

    A graph can be used by one backward pass only; later terms compute the distributions again. With `room`, nothing is
    kept where there is none. detach_uncond: the graph is that of guidance's conditional branch alone.
    """

    def __init__(
        self, rows: Tensor, steps: Sequence[int], *, room: Room | None = None, detach_uncond: bool = False
    ) -> None:
        self._first, self._wanted, self._room, self.detach_uncond = int(rows[0]), steps, room, detach_uncond
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def recording(self, k: int, device: torch.device) -> Iterator[None]:
        """Within the block, what is computed keeps its graph, if step k is one that is kept."""
        if not self._keeps(k):
            yield
            return
        # What autocast copied without a graph, at an earlier step, has none to give.
        torch.clear_autocast_cache()
        with torch.enable_grad():
            if self._room is None or self._room.fits is not None:
                yield
            else:
                with self._room.measured(len(self._wanted), device):
                    yield

    @property
    def is_asked_for(self) -> bool:
        """Whether it is kept whatever room there is."""
        return self._room is None

    def _keeps(self, k: int) -> bool:
        return k in self._wanted and (self._room is None or self._room.fits is not False)

    def add(self, k: int, mean: Tensor, std: Tensor) -> None:
        """Keep step k, if it is one of `steps`, for the next rows: mean [b, C, h, w], standard deviation (0-d)."""
        if self._keeps(k):
            self._steps.setdefault(k, []).append((mean, std))

    def holds(self, steps: Sequence[int]) -> bool:
        """Whether none of these steps has been taken yet."""
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
