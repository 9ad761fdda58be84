"""The shapes suite on images in a folder: the prompts and judge of `shapes`, resumable and split over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.image_folder import Drawn, Measurements, open_picture
from agsm_rl.evaluate.suites.shapes import SUITE, ImageVerdict, ShapesResult, compare, suite_prompts
from agsm_rl.evaluate.table import print_table
from agsm_rl.shapes import world
from agsm_rl.shapes.judge import judge


@dataclass(frozen=True)
class ShapesFigures:
    """A ShapesResult with the other suites' methods. `split` is the split of the prompts; None for other prompts."""

    result: ShapesResult
    split: str | None

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json."""
        return self.result.to_json() | {"split": self.split}

    def show(self, console: Console, other: ShapesFigures | None = None) -> None:
        """Print the lenient and the strict table."""
        if other is None:
            print_table(self.result, console=console)
        else:
            print_table(other.result, self.result, console=console)

    def against(self, other: ShapesFigures) -> dict[str, Any]:
        """This target minus the other, lenient and strict."""
        return {"difference": asdict(compare(other.result, self.result))}


class Shapes:
    """The suite. Images are judged as saved, with 8 bits per channel."""

    name = SUITE

    def __init__(self, *, split: str = "held_out", num_images: int = 600, seed: int = 0) -> None:
        self.split, self.num_images, self.seed = split, num_images, seed
        self._kept = Measurements("verdicts", {"judge": "shapes"})

    def asked(self) -> Mapping[int, Mapping[str, Any]]:
        """The suite's prompts."""
        prompts = suite_prompts(self.split, self.num_images, self.seed)
        return {index: {"prompt": prompt, "tag": world.parse(prompt).tag} for index, prompt in enumerate(prompts)}

    def prepare(self) -> None:
        """Does nothing: there are no models to load."""

    def check(self, images: Sequence[Drawn]) -> None:
        """UserError for a prompt outside the shapes world."""
        for item in images:
            try:
                world.parse(item.prompt)
            except UserError as error:
                raise UserError(f"{item.path.parents[1] / 'metadata.jsonl'}: {error}") from error

    def pending(self, images: Sequence[Drawn]) -> list[Drawn]:
        """The images without a verdict."""
        return [item for item in images if self._kept.read(item.path) is None]

    def measure(self, images: Sequence[Drawn]) -> None:
        """Judge the images."""
        for item in images:
            asked = world.parse(item.prompt)
            seen = judge(open_picture(item.path), asked)
            row = ImageVerdict(item.prompt, asked.tag, seen.correct, seen.strict, seen.reason)
            self._kept.write(item.path, asdict(row))

    def result(self, images: Sequence[Drawn]) -> ShapesFigures:
        """The stored verdicts."""
        rows = []
        for item in images:
            row = self._kept.read(item.path)
            if row is None:
                raise UserError(f"{item.path}: has no verdict yet; run the evaluation again to the end.")
            rows.append(ImageVerdict(**row))
        of_the_split = [row.prompt for row in rows] == suite_prompts(self.split, len(rows), self.seed)
        return ShapesFigures(ShapesResult(tuple(rows)), self.split if of_the_split else None)
