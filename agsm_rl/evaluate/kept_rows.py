"""A suite's rows beside the pictures of a folder: what is missing is judged, what is there is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL.Image import Image

from agsm_rl.errors import UserError
from agsm_rl.evaluate.image_folder import Drawn, Measurements, open_picture, sha256
from agsm_rl.evaluate.suite import Judged, Metadata, Row, Suite


class KeptRows:
    """Rows of a suite, a file per picture and part (image_folder.Measurements).

    A picture is hashed once for all parts: rows of one that changes meanwhile do not count the next time.
    """

    def __init__(self, suite: Suite) -> None:
        self.suite, digest = suite, cache(sha256)
        self._parts = [
            (part, Measurements(part.folder, part.how, of_today=part.of_today, digest=digest)) for part in suite.parts()
        ]

    def pending(self, images: Sequence[Drawn]) -> list[Drawn]:
        """The images that lack a row of some part."""
        return [item for item in images if any(self._row(kept, item) is None for _, kept in self._parts)]

    def judge(self, images: Sequence[Drawn]) -> None:
        """Judge a few images by the parts that have no row of them yet."""
        pictures: dict[Path, Image] = {}
        for part, kept in self._parts:
            missing = [item for item in images if self._row(kept, item) is None]
            for item in missing:
                if item.path not in pictures:
                    pictures[item.path] = open_picture(item.path)
            if not missing:
                continue
            seen = [pictures[item.path] for item in missing]
            rows = part.judge(seen, [item.prompt for item in missing], [item.metadata for item in missing])
            for item, row in zip(missing, rows, strict=True):
                kept.write(item.path, row, self._asked(item))

    def read(self, images: Sequence[Drawn]) -> list[Judged]:
        """The rows of all images; UserError if one has none."""
        judged = []
        for item in images:
            rows = [self._row(kept, item) for _, kept in self._parts]
            if any(row is None for row in rows):
                raise UserError(f"{item.path}: is not measured yet; run the evaluation again to the end.")
            row = self.suite.join(rows)
            judged.append(Judged(item.prompt_index, item.number, item.metadata, row, str(item.path)))
        return judged

    def _row(self, kept: Measurements, item: Drawn) -> Row | None:
        return kept.read(item.path, self._asked(item))

    def _asked(self, item: Drawn) -> Metadata | None:
        """What a row depends on of the prompt: all of it, or nothing."""
        return item.metadata if self.suite.needs_prompts else None


def judged_in_memory(suite: Suite, images: Sequence[Drawn], *, at_once: int) -> list[Judged]:
    """Judge pictures of a folder that nothing is written to."""
    judged = []
    for start in range(0, len(images), at_once):
        part = images[start : start + at_once]
        pictures = [open_picture(item.path) for item in part]
        rows = suite.judge(pictures, [item.prompt for item in part], [item.metadata for item in part])
        judged += [
            Judged(item.prompt_index, item.number, item.metadata, row, str(item.path))
            for item, row in zip(part, rows, strict=True)
        ]
    return judged
