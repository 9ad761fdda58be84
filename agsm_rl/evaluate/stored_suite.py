"""The protocol of suites that measure images in a folder; it goes when all suites are `suite.Suite`s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from rich.console import Console

from agsm_rl.evaluate.image_folder import Drawn


class StoredResult(Protocol):
    """The figures of one target."""

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json: suite, num_images, overall, tags, and any keys that the suite adds."""
        ...

    def show(self, console: Console, other: Self | None = None) -> None:
        """Print the table; with `other`, both targets and their paired difference."""
        ...

    def against(self, other: Self) -> dict[str, Any]:
        """This target minus the other, paired image by image; UserError if their prompts differ."""
        ...


class StoredSuite(Protocol):
    """Measures images in a folder and stores the measurements beside them.

    Attributes:
        name: The suite's name on the command line.
        num_images: How many images are drawn by default.
    """

    name: str
    num_images: int

    def asked(self) -> Mapping[int, Mapping[str, Any]]:
        """The prompts' metadata by number."""
        ...

    def prepare(self) -> None:
        """Load the models that measure, before hours are spent on drawing; UserError for missing weights."""
        ...

    def check(self, images: Sequence[Drawn]) -> None:
        """UserError if images drawn by another tool lack metadata that the suite needs."""
        ...

    def pending(self, images: Sequence[Drawn]) -> list[Drawn]:
        """The images that have not been measured yet."""
        ...

    def measure(self, images: Sequence[Drawn]) -> None:
        """Measure a few images and store the measurements beside them."""
        ...

    def result(self, images: Sequence[Drawn]) -> StoredResult:
        """The result, computed from the stored measurements."""
        ...
