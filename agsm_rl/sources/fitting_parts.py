"""Rows drawn in parts that fit the memory: one that does not is drawn again in halves, and so are all after it."""

import logging
from collections.abc import Callable
from typing import Any

from accelerate.utils import release_memory
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

log = logging.getLogger(__name__)


class FittingParts:
    """Parts of at most `size` images; a row counts as `images` images. `size` falls where a part does not fit."""

    def __init__(self, size: int, *, name: str, images: int = 1) -> None:
        self.size, self._name, self._images = size, name, images

    def run(
        self,
        rows: Tensor,
        work: Callable[[Tensor], Any],
        *,
        halve: bool = True,
        lighten: Callable[[], bool] = lambda: False,
    ) -> list[Any]:
        """What `work` makes of each part; it must leave nothing behind when it fails.

        halve: whether `work` may be tried again with fewer rows. lighten: called first; True if it freed memory, so
        that the same part is tried again.
        """
        made = []
        while len(rows):
            part = rows[: max(1, self.size // self._images)]
            try:
                made.append(work(part))
                rows = rows[len(part) :]
                continue
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                is_lighter = lighten()
                if not is_lighter and (not halve or len(part) == 1):
                    raise
            release_memory()  # not before, because an exception holds what was computed
            if not is_lighter:
                self._halve(len(part))
        return made

    def _halve(self, count: int) -> None:
        self.size = max(1, count // 2) * self._images
        log.warning(
            "%s: %d images at once do not fit the memory; from now on %d are drawn at once. Write sample_batch_size: "
            "%d to spare a run the attempt",
            self._name,
            count * self._images,
            self.size,
            self.size,
        )
