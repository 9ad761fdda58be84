"""How many pictures an evaluation draws at once where the recipe leaves it open: as fits a GPU, and a CPU's caches.

On a GPU the memory of one picture is found by a rehearsal without data (doctor/memory), once for a size and guidance.
A result depends on the size of its batch by rounding only: each picture has its own noise.
"""

from __future__ import annotations

import logging
from math import ceil

import torch

from agsm_rl.evaluate.measured import Entry
from agsm_rl.interfaces import Backbone
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import UNKNOWN_BATCH, Block, Evaluate
from agsm_rl.training.free_memory import free_memory
from agsm_rl.training.processes import Processes
from agsm_rl.training.sizes import Resolution

log = logging.getLogger(__name__)
MOST = 64
"""On a GPU, more at once take no less time for each."""
SHARE = 0.8
"""Of the free memory that may be used: predictions are accurate to about 15 %."""


class BatchSizes:
    """Chooses batch sizes for a backbone of the block `block`; what was found is remembered."""

    def __init__(self, block: Block, parts: Parts) -> None:
        self.block, self.parts = block, parts
        self._bytes: dict[tuple[Resolution, bool], float | None] = {}
        self._chosen: dict[tuple[str, float, Resolution | None, int], int] = {}
        """By suite, guidance, size and number: free memory changes in a run, but base and trained are drawn alike."""

    def choose(
        self,
        options: Evaluate,
        backbone: Backbone,
        entry: Entry,
        guidance: float,
        processes: Processes | None = None,
    ) -> int:
        """The size that is given, or the one that fits; all processes of a run must call this, and get the same."""
        if options.batch_size is not None:
            return options.batch_size
        key = (entry.name, guidance, entry.resolution(options), entry.made.suite.num_images)
        if key not in self._chosen:
            self._chosen[key] = self._choose(options, backbone, entry, guidance, processes)
        return self._chosen[key]

    def _choose(
        self, options: Evaluate, backbone: Backbone, entry: Entry, guidance: float, processes: Processes | None
    ) -> int:
        size = UNKNOWN_BATCH
        if backbone.device.type == "cuda":
            size = self._fitting(backbone.device, entry.resolution(options) or backbone.resolution, guidance)
        if processes is not None and processes.count > 1:
            size = int(processes.numbers(float(size)).min())
            size = shared_out(size, entry.made.suite.num_images, processes.count)
        return size

    def _fitting(self, device: torch.device, resolution: Resolution, guidance: float) -> int:
        each = self._bytes_of_one(resolution, guidance)
        return UNKNOWN_BATCH if each is None else fitting(each, free_memory(device))

    def _bytes_of_one(self, resolution: Resolution, guidance: float) -> float | None:
        """What each further picture takes; None where it cannot be predicted."""
        key = (resolution, guidance > 1)
        if key not in self._bytes:
            from agsm_rl.doctor.memory.drawing import bytes_of_one

            each = None
            try:
                each = bytes_of_one(self.block, self.parts, resolution, guidance)
            except Exception as error:  # noqa: BLE001 - other people's parts may fail in any way without data
                log.warning("evaluate.batch_size: %d, because memory cannot be predicted (%s)", UNKNOWN_BATCH, error)
            self._bytes[key] = each
        return self._bytes[key]


def shared_out(size: int, num_images: int, processes: int) -> int:
    """The size, halved until there is a batch for each process."""
    while size > 1 and ceil(num_images / size) < processes:
        size //= 2
    return size


def fitting(each: float, free: float) -> int:
    """The largest power of two, MOST at most, of pictures of `each` bytes that fit SHARE of the `free` ones."""
    size = 1
    while size < MOST and 2 * size * each <= SHARE * free:
        size *= 2
    return size
