"""Aspect buckets: pictures of several shapes are learned from in their own, and a batch is of one shape.

Each picture goes to the bucket (a size) that loses least of it, by cutting it, blowing it up or shrinking it, and is
cut in the centre. Buckets with too few pictures for a batch are given up, and their pictures go to the next best.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.training.sizes import FORMS, Size, check_resolution

AUTO = "auto"
STEPS_PER_SIDE = 16
"""The sides of `auto` buckets are multiples of this part of the base's side: 64 of 1024, as is usual for SDXL."""

SHRINKING = 0.25
"""How much of a picture counts as lost by shrinking it, against blowing it up as much."""


class Crop(NamedTuple):
    """How a picture was cut: its own size, and what was cut off at the top and left after it was resized, in pixels.

    These are SDXL's conditions on size and crop (arXiv 2307.01952, section 2.2).
    """

    height: int
    width: int
    top: int
    left: int


def check_buckets(buckets: Any) -> tuple[Size, ...] | str | None:
    """A source's option `buckets`: sizes, each once, or `auto`; UserError for anything else."""
    if buckets is None or buckets == AUTO:
        return AUTO if buckets else None
    if not isinstance(buckets, list | tuple) or not buckets:
        raise UserError(f"buckets: got {buckets!r}; write {AUTO}, or a list of sizes, each {FORMS}")
    sizes = [check_resolution(item, where=f"buckets[{number}]") for number, item in enumerate(buckets)]
    if twice := [str(size) for size, count in Counter(sizes).items() if count > 1]:
        raise UserError(f"buckets: {twice[0]} is listed twice; leave one of them out")
    return tuple(sizes)


def automatic_buckets(base: Size, multiple: int) -> tuple[Size, ...]:
    """Sizes of about the area of `base`, never more, with sides from half of its side to twice; as kohya's scripts do.

    Sides are multiples of a sixteenth of the side, and of `multiple`, which the backbone needs.
    """
    side = math.isqrt(base.area)
    step = math.ceil(side / STEPS_PER_SIDE / multiple) * multiple
    shortest, longest = max(step, side // 2 // step * step), 2 * side // step * step
    square = max(step, side // step * step)
    sizes = {Size(square, square)}
    for first in range(shortest, longest + 1, step):
        second = min(longest, base.area // first // step * step)
        if second >= shortest:
            sizes |= {Size(first, second), Size(second, first)}
    return tuple(sorted(sizes))


def losses(pictures: NDArray[np.int64], buckets: Sequence[Size]) -> NDArray[np.float64]:
    """What each bucket loses of each picture [N, 2] (height, width), [N, buckets]: 0 is nothing.

    It is log(1 / share of the picture that is kept), plus the log of how much each side is blown up, or SHRINKING of
    the log of how much it is shrunk. Among buckets of one area, the least cut decides.
    """
    scales = np.array(buckets)[None, :, :] / pictures[:, None, :]  # [N, buckets, 2]
    cut = np.log(scales.max(axis=2) / scales.min(axis=2))
    blown_up = np.log(scales.prod(axis=2)) / 2
    return np.asarray(cut + np.maximum(blown_up, -SHRINKING * blown_up))


def assign(
    pictures: NDArray[np.int64], buckets: Sequence[Size], *, batch_size: int, usable: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The number of each row's bucket, [N], for pictures [N, images, 2]: the one that loses least of all its images.

    Where several lose the same, the largest. Buckets that fewer than `batch_size` rows (`usable` ones; None: all) go to
    are given up, the smallest first. Rows with an image of unknown size (0) go where most others go.
    """
    known = (pictures > 0).all(axis=(1, 2))
    counted = np.ones(int(known.sum()), dtype=bool) if usable is None else usable[known]
    order = sorted(range(len(buckets)), key=lambda number: (-buckets[number].area, number))
    each = [losses(pictures[known, image], [buckets[number] for number in order]) for image in range(pictures.shape[1])]
    loss = np.round(np.sum(each, axis=0), 9)
    left = np.ones(len(buckets), dtype=bool)
    while True:
        chosen = np.where(left, loss, np.inf).argmin(axis=1)
        counts = np.bincount(chosen[counted], minlength=len(buckets))
        few = [number for number in np.flatnonzero(left) if counts[number] < batch_size]
        if not few or left.sum() == 1:
            break
        left[min(few, key=lambda number: (counts[number], -number))] = False
    found = np.full(len(pictures), order[int(counts.argmax())])
    found[known] = np.array(order)[chosen]
    return found


def box(picture: Size, size: Size) -> tuple[float, float, float, float]:
    """The largest part from the centre in the shape of `size`: left, top, right, bottom, in the picture's pixels."""
    height, width = float(picture.height), float(picture.width)
    if picture.width * size.height >= picture.height * size.width:
        width = picture.height * size.width / size.height
    else:
        height = picture.width * size.height / size.width
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    return left, top, left + width, top + height


def crop_of(picture: Size, size: Size) -> Crop:
    """How a picture is cut to `size`."""
    left, top, _, _ = box(picture, size)
    scale = max(size.height / picture.height, size.width / picture.width)
    return Crop(*picture, round(top * scale), round(left * scale))


def crops_of(cuts: Sequence[Crop | None], device: torch.device) -> Tensor | None:
    """The rows' crops as a batch holds them, float32 [B, 4]; None where pictures are not sorted into buckets."""
    known = [crop for crop in cuts if crop is not None]
    return torch.tensor(known, dtype=torch.float32, device=device) if known else None
