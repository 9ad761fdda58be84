"""Sizes of pictures: how options write them, and drawing at another size than the backbone's own for a while.

A size is one number, the side of a square, or [height, width], in diffusers' and torch's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator

from agsm_rl.errors import UserError
from agsm_rl.training.limits import MAX_RESOLUTION

if TYPE_CHECKING:
    from torch import Tensor

    from agsm_rl.interfaces import Backbone, Sampler

Resolution = int | tuple[int, int]
"""As options write it: pixels per side, or (height, width)."""
FORMS = "pixels per side, such as 768, or [height, width], such as [768, 1344] for a wide picture"


def _is_size(value: Any) -> bool:
    sides = [value] if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or (sides is value and len(sides) != 2):
        return False
    return all(isinstance(side, int) and not isinstance(side, bool) for side in sides)


def _size_option(value: Any) -> Any:
    if value is not None and not _is_size(value):
        raise ValueError(f"got {value!r:.60}; a size is {FORMS}")
    return value


def _buckets_option(value: Any) -> Any:
    if value is None or value == "auto":
        return value
    if not isinstance(value, list | tuple) or not all(_is_size(item) for item in value):
        raise ValueError(f"got {value!r:.60}; write auto, or a list of sizes, each {FORMS}")
    return value


PictureSize = Annotated[int | tuple[int, int], BeforeValidator(_size_option)]
"""The type of such an option."""
Buckets = Annotated[Literal["auto"] | list[PictureSize], BeforeValidator(_buckets_option)]
"""The type of the option `buckets` (sources/buckets.py)."""


class Size(NamedTuple):
    """A picture's height and width in pixels."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Its number of pixels."""
        return self.height * self.width

    @property
    def resolution(self) -> Resolution:
        """As options write it, the shorter form where there is one."""
        return self.height if self.height == self.width else (self.height, self.width)

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


def size_of(resolution: Resolution) -> Size:
    """The size that an option asks for."""
    return Size(resolution, resolution) if isinstance(resolution, int) else Size(*resolution)


def check_resolution(resolution: Any, *, multiple: int = 1, largest: int = MAX_RESOLUTION, where: str) -> Size:
    """The size that an option asks for; UserError unless both sides are multiples of `multiple`, at most `largest`."""
    if not _is_size(resolution):
        raise UserError(f"{where}: got {resolution!r}; a size is {FORMS}.")
    sides = [resolution, resolution] if isinstance(resolution, int) else resolution
    limit = largest // multiple * multiple
    if not all(multiple <= side <= limit and side % multiple == 0 for side in sides):
        got = resolution if isinstance(resolution, int) else list(resolution)
        needed = "a positive number" if multiple == 1 else f"a positive multiple of {multiple}"
        raise UserError(f"{where}: got {got}; {needed} is needed for each side, at most {limit}.")
    return Size(*sides)


def parse_resolution(text: str, *, where: str) -> Resolution:
    """The size in a command-line option, `768` or `768,1344` (height, width); UserError for anything else."""
    if not re.fullmatch(r"\d+(,\d+)?", text.replace(" ", "")):
        raise UserError(f"{where}: got '{text}'; write pixels per side (768), or HEIGHT,WIDTH (768,1344).")
    return check_resolution([int(side) for side in text.split(",")] * (2 - text.count(",")), where=where).resolution


def check_drawable(backbone: Backbone, resolution: Any, *, where: str) -> Size:
    """The size that an option asks for; UserError where the backbone cannot draw it."""
    return check_resolution(resolution, multiple=step_of(backbone), largest=_longest(backbone), where=where)


def can_draw(backbone: Backbone, size: Size) -> bool:
    """Whether the backbone draws pictures of that size."""
    step, longest = step_of(backbone), _longest(backbone)
    return all(side % step == 0 and step <= side <= longest for side in size)


def step_of(backbone: Backbone) -> int:
    """Of what each side of a picture must be a multiple."""
    return int(getattr(backbone, "resolution_step", _factor(backbone)))


def _longest(backbone: Backbone) -> int:
    return int(getattr(backbone, "longest_side", MAX_RESOLUTION))


def latent_shape_at(backbone: Backbone, size: Size) -> tuple[int, int, int]:
    """The shape of a picture's latents, [C, h, w], where the picture is of this size."""
    factor = _factor(backbone)
    return backbone.latent_shape[0], size.height // factor, size.width // factor


def _factor(backbone: Backbone) -> int:
    """Pixels per latent."""
    return size_of(backbone.resolution).height // backbone.latent_shape[1]


@contextmanager
def drawing_at(backbone: Backbone, resolution: Resolution | None, *, where: str = "resolution") -> Iterator[None]:
    """Within the block, the backbone draws at this size; None leaves its own. UserError if it cannot."""
    if resolution is None or size_of(resolution) == size_of(backbone.resolution):
        yield
        return
    size = check_drawable(backbone, resolution, where=where)
    before = backbone.resolution, backbone.latent_shape
    shape = latent_shape_at(backbone, size)
    try:
        backbone.resolution, backbone.latent_shape = size.resolution, shape
        yield
    finally:
        backbone.resolution, backbone.latent_shape = before


def sampler_for(backbone: Backbone, num_steps: int, latents: Tensor) -> Sampler:
    """The schedule on which pictures with such latents [..., C, h, w] are drawn: its shift may depend on their size."""
    if tuple(latents.shape[-3:]) == tuple(backbone.latent_shape):
        return backbone.sampler(num_steps)
    factor = _factor(backbone)
    height, width = (side * factor for side in latents.shape[-2:])
    with drawing_at(backbone, (height, width)):
        return backbone.sampler(num_steps)
