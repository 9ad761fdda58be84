"""Pictures of the next batch, read and resized in threads while a GPU computes the step before.

They are what reading them in turn gives. What cannot be read here is read again in its turn, where it is reported.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from agsm_rl.sources.held_latents import Place
from agsm_rl.sources.latents import resized
from agsm_rl.sources.pictures import read_picture
from agsm_rl.training.sizes import Size

THREADS = 4


class ReadAhead:
    """Reads pictures by their places before they are asked for; `row` gives a data set's row by its number."""

    def __init__(self, row: Callable[[int], Any]) -> None:
        self._row = row
        self._threads: ThreadPoolExecutor | None = None
        self._coming: dict[Place, Future[Image.Image]] = {}

    def begin(self, places: Sequence[Place], size: Size | None) -> None:
        """Read these; what was not asked for since the last call is dropped. Resized to `size`, or left as they are."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="reading")
        for future in self._coming.values():
            future.cancel()
        self._coming = {place: self._threads.submit(self._read, place, size) for place in places}

    def take(self, place: Place) -> Image.Image | None:
        """The picture at a place; None where it was not begun, or cannot be read."""
        future = self._coming.pop(place, None)
        return None if future is None or future.exception() is not None else future.result()

    def _read(self, place: Place, size: Size | None) -> Image.Image:
        number, column = place
        picture = read_picture(self._row(number)[column], "")
        return picture if size is None else resized(picture, size)


def pays_off(device: torch.device) -> bool:
    """Whether reading ahead takes nothing from the step: on a CPU, both want its cores; a rehearsal reads nothing."""
    return device.type not in ("cpu", "meta")
