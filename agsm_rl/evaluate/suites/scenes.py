"""The scenes suite: prompts of the richer drawn world, and what is wrong with a picture, one figure per kind of fault.

Too many objects and too few are told apart, as are wrong colours, shapes, sizes and places: a method may cure one and
cause another. The split `validation` is for choices (guidance, learning rate, when to stop); `held_out` has other
requirements, none of which training shows either, and is looked at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rich import box
from rich.console import Console
from rich.table import Table

from agsm_rl.evaluate.intervals import Interval, mean_of, paired_difference, wilson
from agsm_rl.evaluate.suites.shapes import ImageVerdict, Shapes, ShapesResult, by_tag, change, share
from agsm_rl.shapes.judge import FAULTS, Verdict
from agsm_rl.shapes.scenes import Requirement
from agsm_rl.shapes.worlds import SCENES, World

SUITE = "scenes"


@dataclass(frozen=True)
class SceneVerdict(ImageVerdict):
    """The verdict on one image, and which faults it has."""

    too_many: bool
    too_few: bool
    wrong_color: bool
    wrong_shape: bool
    wrong_size: bool
    wrong_place: bool
    unclean: bool


@dataclass(frozen=True)
class ScenesResult(ShapesResult):
    """The verdicts of one model, in the order of the prompts."""

    SUITE: ClassVar[str] = SUITE
    ROW: ClassVar[type[ImageVerdict]] = SceneVerdict

    def scores(self) -> dict[str, Interval]:
        """`overall` and `strict`, and the share of images with each fault: means over tags."""
        shares = {name: self.shares(strict=name == "strict").overall for name in ("overall", "strict")}
        return shares | {fault: mean_of(list(tags.values())) for fault, tags in self.faults().items()}

    def faults(self) -> dict[str, dict[str, Interval]]:
        """The share of images with each fault, by tag."""
        return {
            fault: {
                tag: wilson(sum(getattr(row, fault) for row in rows), len(rows))
                for tag, rows in by_tag(self.verdicts).items()
            }
            for fault in FAULTS
        }

    def to_json(self) -> dict[str, Any]:
        """The shapes suite's content, and the faults: the mean over tags, and by tag."""
        faults = {
            fault: {
                "overall": asdict(mean_of(list(tags.values()))),
                "tags": {tag: asdict(x) for tag, x in tags.items()},
            }
            for fault, tags in self.faults().items()
        }
        content = super().to_json()
        rows = content.pop("images")
        return content | {"faults": faults, "images": rows}

    def against(self, other: ShapesResult) -> dict[str, Any]:
        """This minus the other, lenient, strict, and by fault."""
        content = super().against(other)
        content["difference"]["faults"] = {fault: asdict(part) for fault, part in self.fewer(other).items()}
        return content

    def fewer(self, other: ShapesResult) -> dict[str, Interval]:
        """This minus the other by fault, as means over tags; both have the same prompts."""
        before, after = by_tag(other.verdicts), by_tag(self.verdicts)
        differences = {}
        for fault in FAULTS:
            marks = [[[getattr(row, fault) for row in side[tag]] for side in (before, after)] for tag in before]
            differences[fault] = mean_of([paired_difference(*both) for both in marks])
        return differences

    def show(
        self, console: Console, other: ShapesResult | None = None, *, labels: tuple[str, str] = ("other", "this")
    ) -> None:
        """Print the lenient and the strict table, and that of the faults."""
        super().show(console, other, labels=labels)
        heading = f"{SUITE}, share of images with each fault, %, 95 % intervals"
        rows = Table(title=heading, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("fault", *((*labels, "difference") if other else ("share",))):
            rows.add_column(column, justify="left" if column == "fault" else "right", no_wrap=True)
        scores = [result.scores() for result in (other, self) if result is not None]
        changes = self.fewer(other) if other is not None else {}
        for fault in FAULTS:
            cells = [share(part[fault]) for part in scores]
            rows.add_row(fault, *cells, *([change(changes[fault], less_is_better=True)] if changes else []))
        console.print(rows)


class Scenes(Shapes):
    """Is what the prompt asks for there, and if not, what is wrong? By the scenes world's own judge.

    Args:
        split: Prompts of `train`, `validation` or `held_out`. Null: the evaluation's split, `held_out` by default.
        num_images: One image of each of this many prompts, a third of them of counting.
        seed: Seed of the prompts. Null: the evaluation's.
        any_base: Also accept a base that was not trained on this world.
    """

    name = SUITE
    SCORES = ("overall", "strict", *FAULTS)
    WORLD: ClassVar[World] = SCENES
    RESULT: ClassVar[type[ShapesResult]] = ScenesResult
    smaller_is_better = frozenset(FAULTS)

    def verdict(self, prompt: str, asked: Requirement, seen: Verdict) -> ImageVerdict:
        """A picture's row, with one mark per fault."""
        faults: Mapping[str, bool] = {fault: fault in seen.faults for fault in FAULTS}
        return SceneVerdict(prompt, asked.tag, seen.correct, seen.strict, seen.reason, **faults)
