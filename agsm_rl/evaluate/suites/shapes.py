"""The shapes suite: draw one image per prompt, judge each, and compare two models on the same prompts and noise.

The overall score is GenEval's: the mean over tags of the share of correct images. Every figure is given twice, lenient
(everything the prompt asks for is there) and strict (and nothing else is).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.evaluate.intervals import Interval, mean_of, paired_difference, wilson
from agsm_rl.shapes import world
from agsm_rl.shapes.data import prompts as draw_prompts
from agsm_rl.shapes.judge import judge

SUITE = "shapes"
COUNTING_SHARE = 1 / 3
"""Counting gets a third of the images: methods differ most there, and it is the hardest to measure."""

Draw = Callable[[list[str], list[int]], Tensor]
"""`draw(prompts, seeds)` → images [B, 3, H, W] in [0, 1]; an image depends on its own prompt and seed only."""


@dataclass(frozen=True)
class ImageVerdict:
    """The verdict on one image of a suite."""

    prompt: str
    tag: str
    correct: bool
    strict: bool
    reason: str


@dataclass(frozen=True)
class Scores:
    """Shares of correct images: per tag with Wilson intervals and counts, and the mean over tags."""

    overall: Interval
    tags: dict[str, Interval]
    counts: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """`overall` with its interval, and `tags` as {tag: {correct, total, score, low, high}}."""
        rows = {}
        for tag, share in self.tags.items():
            correct, total = self.counts[tag]
            figures = {"score": share.value, "low": share.low, "high": share.high}
            rows[tag] = {"correct": correct, "total": total, **figures}
        return {"overall": self.overall.value, "low": self.overall.low, "high": self.overall.high, "tags": rows}


@dataclass(frozen=True)
class ShapesResult:
    """The verdicts of one model, in the order of the prompts."""

    verdicts: tuple[ImageVerdict, ...]

    def scores(self, *, strict: bool) -> Scores:
        """The shares by the strict or the lenient verdict."""
        counts = {}
        for tag, rows in _by_tag(self.verdicts).items():
            counts[tag] = (sum(_marks(rows, strict)), len(rows))
        tags = {tag: wilson(*count) for tag, count in counts.items()}
        return Scores(mean_of(list(tags.values())), tags, counts)

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json: the lenient figures on top, the strict ones under `strict`, and every verdict."""
        head = {"suite": SUITE, "num_images": len(self.verdicts), **self.scores(strict=False).to_json()}
        return head | {"strict": self.scores(strict=True).to_json(), "images": [asdict(row) for row in self.verdicts]}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "ShapesResult":
        """The result that an eval.json of this suite holds; UserError if it is not one."""
        if content.get("suite") != SUITE or not content.get("images"):
            raise UserError(f"eval.json: suite {content.get('suite')!r} has no verdicts of the suite '{SUITE}'")
        return ShapesResult(tuple(ImageVerdict(**row) for row in content["images"]))


@dataclass(frozen=True)
class Differences:
    """Trained minus base: per tag and as the mean over tags, with paired intervals."""

    overall: Interval
    tags: dict[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """The differences by both verdicts."""

    lenient: Differences
    strict: Differences


def suite_prompts(split: str, num_images: int, seed: int) -> list[str]:
    """The suite's prompts: a third counting, the rest shared evenly by the other five tags."""
    return draw_prompts(split, num_images, seed, COUNTING_SHARE)


def evaluate(draw: Draw, prompts: Sequence[str], *, seed: int = 0, batch_size: int = 64) -> ShapesResult:
    """Draw one image per prompt, image i from the noise of seed + i, and judge each.

    The same prompts and `seed` give two models the same noise at any batch size; `compare` compares them.
    Raises UserError for a prompt outside the shapes world, before anything is drawn.
    """
    if not prompts:
        raise UserError("suite 'shapes': no prompts; give one or more")
    asked = [world.parse(prompt) for prompt in prompts]
    verdicts = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        images = draw([prompts[i] for i in rows], [seed + i for i in rows])
        for i, image in zip(rows, images, strict=True):
            seen = judge(image, asked[i])
            verdicts.append(ImageVerdict(prompts[i], asked[i].tag, seen.correct, seen.strict, seen.reason))
    return ShapesResult(tuple(verdicts))


def compare(base: ShapesResult, trained: ShapesResult) -> Comparison:
    """Trained minus base on the same prompts; UserError if they are not the same prompts in the same order."""
    if [row.prompt for row in base.verdicts] != [row.prompt for row in trained.verdicts]:
        raise UserError("the two results are on different prompts; evaluate both on the same prompts, split and seed")
    return Comparison(
        lenient=_differences(base, trained, strict=False), strict=_differences(base, trained, strict=True)
    )


def _differences(base: ShapesResult, trained: ShapesResult, *, strict: bool) -> Differences:
    before, after = _by_tag(base.verdicts), _by_tag(trained.verdicts)
    tags = {tag: paired_difference(_marks(before[tag], strict), _marks(after[tag], strict)) for tag in before}
    return Differences(mean_of(list(tags.values())), tags)


def _by_tag(verdicts: Iterable[ImageVerdict]) -> dict[str, list[ImageVerdict]]:
    """The verdicts of each tag that occurs, tags in the world's order."""
    rows: dict[str, list[ImageVerdict]] = {tag: [] for tag in world.TAGS}
    for verdict in verdicts:
        rows[verdict.tag].append(verdict)
    return {tag: of_tag for tag, of_tag in rows.items() if of_tag}


def _marks(rows: Iterable[ImageVerdict], strict: bool) -> list[bool]:
    return [row.strict if strict else row.correct for row in rows]
