"""What a suite of `agsm-rl eval` is: prompts to draw, a measurement of each image, and a result made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from rich.console import Console

from agsm_rl.evaluate.image_folder import Drawn


class Result(Protocol):
    """The figures of one target."""

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json: suite, num_images, overall, tags, and what the suite adds."""
        ...

    def show(self, console: Console, other: Self | None = None) -> None:
        """Print the table; with `other`, both and their paired difference."""
        ...

    def against(self, other: Self) -> dict[str, Any]:
        """This minus the other, paired image by image; UserError if they are not on the same prompts."""
        ...


class Suite(Protocol):
    """Measures images that are in a folder; what it measured is kept beside them."""

    name: str
    num_images: int
    """As many as are drawn where nothing else is said."""

    def asked(self) -> Mapping[int, Mapping[str, Any]]:
        """The prompts' metadata by their numbers."""
        ...

    def prepare(self) -> None:
        """Load what measures, before hours are spent on drawing; UserError for missing weights."""
        ...

    def check(self, images: Sequence[Drawn]) -> None:
        """UserError when images that someone else drew do not carry what the suite needs."""
        ...

    def pending(self, images: Sequence[Drawn]) -> list[Drawn]:
        """Those that are not measured yet."""
        ...

    def measure(self, images: Sequence[Drawn]) -> None:
        """Measure a few images and keep what was found beside them."""
        ...

    def result(self, images: Sequence[Drawn]) -> Result:
        """The result, from what is kept beside the images."""
        ...
