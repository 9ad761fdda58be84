"""The shapes suite: prompts of the drawn world, its deterministic judge, and shares of correct images by tag.

The overall score is GenEval's: the mean over tags of the share of correct images. Every figure is given twice, lenient
(everything the prompt asks for is there) and strict (and nothing else is). No weights are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL.Image import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agsm_rl.errors import UserError
from agsm_rl.evaluate.figures import Scores
from agsm_rl.evaluate.intervals import Interval, mean_of, paired_difference, wilson
from agsm_rl.evaluate.suite import Judged, Metadata, Row, Suite
from agsm_rl.files import local_path, read_json
from agsm_rl.recipe.options import NumImages, Seed
from agsm_rl.run.screen import make_console, styled
from agsm_rl.shapes.data import prompts as draw_prompts
from agsm_rl.shapes.judge import Verdict
from agsm_rl.shapes.scenes import Requirement, Split
from agsm_rl.shapes.worlds import SHAPES, WORLDS, World

SUITE = "shapes"
TAGS = SHAPES.tags
"""Every world has GenEval's, in this order."""
COUNTING_SHARE = 1 / 3
"""Counting gets a third of the images: methods differ most there, and it is the hardest to measure."""
SMALL_VOCABULARY = 2000
"""Tokens of a base of the world at most; it has some hundreds, CLIP's own vocabulary has 49,408."""


@dataclass(frozen=True)
class ImageVerdict:
    """The verdict on one image of a suite."""

    prompt: str
    tag: str
    correct: bool
    strict: bool
    reason: str


@dataclass(frozen=True)
class ShapesResult:
    """The verdicts of one model, in the order of the prompts. `split` is the prompts' split; None for other prompts."""

    SUITE: ClassVar[str] = SUITE
    ROW: ClassVar[type[ImageVerdict]] = ImageVerdict

    verdicts: tuple[ImageVerdict, ...]
    split: str | None = None

    def scores(self) -> dict[str, Interval]:
        """`overall`, by the lenient verdict, and `strict`: means over tags."""
        return {name: self.shares(strict=name == "strict").overall for name in Shapes.SCORES}

    def per_image(self) -> dict[str, list[float]]:
        """None: both scores are means over tags."""
        return {}

    def shares(self, *, strict: bool) -> Scores:
        """The shares by the strict or the lenient verdict."""
        counts = {}
        for tag, rows in by_tag(self.verdicts).items():
            counts[tag] = (sum(_marks(rows, strict)), len(rows))
        tags = {tag: wilson(*count) for tag, count in counts.items()}
        return Scores(mean_of(list(tags.values())), tags, counts)

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json: the lenient figures on top, the strict ones under `strict`, and every verdict."""
        head = {"suite": self.SUITE, "num_images": len(self.verdicts), **self.shares(strict=False).to_json()}
        rows = [asdict(row) for row in self.verdicts]
        return head | {"strict": self.shares(strict=True).to_json(), "split": self.split, "images": rows}

    def show(
        self, console: Console, other: ShapesResult | None = None, *, labels: tuple[str, str] = ("other", "this")
    ) -> None:
        """Print the lenient and the strict table."""
        if other is None:
            print_table(self, console=console)
        else:
            print_table(other, self, console=console, labels=labels)

    def against(self, other: ShapesResult) -> dict[str, Any]:
        """This minus the other, lenient and strict."""
        return {"difference": asdict(self.minus(other))}

    def minus(self, other: ShapesResult) -> Comparison:
        """This minus the other on the same prompts; UserError if they are not the same prompts in the same order."""
        return compare(other, self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The result that an eval.json of this suite holds; UserError if it is not one."""
        if content.get("suite") != cls.SUITE or not content.get("images"):
            raise UserError(f"eval.json: suite {content.get('suite')!r} has no verdicts of the suite '{cls.SUITE}'")
        keys = cls.ROW.__dataclass_fields__
        rows = [cls.ROW(**{key: row[key] for key in keys}) for row in content["images"]]
        return cls(tuple(rows), content.get("split"))


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


class Shapes(Suite):
    """Is what the prompt asks for there, by the world's own judge?

    Args:
        split: Prompts of `train`, `validation` or `held_out`. Null: the evaluation's split, `held_out` by default.
        num_images: One image of each of this many prompts, a third of them of counting.
        seed: Seed of the prompts. Null: the evaluation's.
        any_base: Also accept a base that was not trained on this world.
    """

    name = SUITE
    folder = "verdicts"
    only_draws = frozenset({"any_base"})  # the result names the split, if the prompts are those of split and seed
    SCORES: tuple[str, ...] = ("overall", "strict")
    WORLD: ClassVar[World] = SHAPES
    keeps_size = True
    RESULT: ClassVar[type[ShapesResult]] = ShapesResult

    def __init__(
        self, *, split: Split | None = None, num_images: NumImages = 600, seed: Seed = 0, any_base: bool = False
    ) -> None:
        self.split, self.num_images, self.seed, self.any_base = split or "held_out", num_images, seed, any_base
        self._drawn: dict[tuple[str, int, int], list[str]] = {}

    def score_names(self) -> Sequence[str]:
        """`overall` and `strict`."""
        return self.SCORES

    def how(self) -> Mapping[str, Any]:
        """There is one judge."""
        return {"judge": self.name}

    def prompts(self) -> Mapping[int, Metadata]:
        """The split's prompts, with their tags."""
        prompts = self.first_prompts(self.num_images, self.seed)
        parse = self.WORLD.parse
        return {index: {"prompt": prompt, "tag": parse(prompt).tag} for index, prompt in enumerate(prompts)}

    def first_prompts(self, num_images: int, seed: int) -> list[str]:
        """So many prompts of the split, drawn with a seed."""
        key = (self.split, num_images, seed)
        if key not in self._drawn:
            self._drawn[key] = suite_prompts(self.split, num_images, seed, self.WORLD)
        return list(self._drawn[key])

    def check(self, metadata: Metadata) -> None:
        """UserError for a prompt outside the world."""
        self.WORLD.parse(str(metadata["prompt"]))

    def check_base(self, backbone: Mapping[str, Any]) -> None:
        """UserError unless the base has the world's words as its vocabulary: a builtin, or what was made from one."""
        if not self.any_base and backbone.get("checkpoint") is not None and not is_of_the_world(backbone, self.WORLD):
            name, others = self.name, [world for world in WORLDS.values() if world is not self.WORLD]
            fitting = [f"Its own is the suite '{one.name}'. " for one in others if is_of_the_world(backbone, one)]
            raise UserError(
                f"the suite '{name}' draws prompts of the small {name} world ('two red stars'), and "
                f"'{backbone['checkpoint']}' was not trained on it, so the figures would say nothing about the model. "
                f"{''.join(fitting)}Measure rewards on your own prompts instead: {INSTEAD}. To draw the {name} prompts "
                f"all the same: evaluate.suites: {{{name}: {{use: {name}, any_base: true}}}}, or --any-base."
            )

    def judge(self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Row]:
        """The lenient and the strict verdict on each picture, with the reason."""
        rows = []
        for image, prompt in zip(images, prompts, strict=True):
            asked = self.WORLD.parse(prompt)
            rows.append(asdict(self.verdict(prompt, asked, self.WORLD.judge(image, asked))))
        return rows

    def verdict(self, prompt: str, asked: Requirement, seen: Verdict) -> ImageVerdict:
        """A picture's row."""
        return ImageVerdict(prompt, asked.tag, seen.correct, seen.strict, seen.reason)

    def result(self, judged: Sequence[Judged]) -> ShapesResult:
        """The verdicts in order."""
        rows = tuple(self.RESULT.ROW(**item.row) for item in judged)
        of_the_split = [row.prompt for row in rows] == self.first_prompts(len(rows), self.seed)
        return self.RESULT(rows, self.split if of_the_split else None)


INSTEAD = (
    "evaluate: {suites: {mine: {use: rewards, prompts: prompts.txt, rewards: {clip_score: {}}}}} in a recipe, "
    "--suite rewards --prompts prompts.txt --reward clip_score with `agsm-rl eval`"
)


def suite_prompts(split: str, num_images: int, seed: int, world: World = SHAPES) -> list[str]:
    """The suite's prompts: a third counting, the rest shared evenly by the other five tags."""
    return draw_prompts(split, num_images, seed, COUNTING_SHARE, world)


def is_of_the_world(backbone: Mapping[str, Any], world: World = SHAPES) -> bool:
    """Whether a base's tokenizer has the world's vocabulary; False where there is no file to tell."""
    checkpoint = str(backbone["checkpoint"])
    if checkpoint.startswith("builtin:"):
        return checkpoint.startswith(f"builtin:{world.name}-")
    folder = local_path(checkpoint)
    if not folder.is_dir():  # a single file has no tokenizer; its configuration's folder has
        folder = local_path(str(backbone.get("config") or ""))
    try:
        vocabulary = _vocabulary(folder / "tokenizer")
    except (UserError, OSError, LookupError, TypeError):
        return False
    return len(vocabulary) <= SMALL_VOCABULARY and all(
        word in vocabulary or f"{word}</w>" in vocabulary for word in world.vocabulary() if word.isalpha()
    )


def _vocabulary(tokenizer: Path) -> set[str]:
    """The tokens of a saved tokenizer, in either form that transformers writes."""
    file = tokenizer / "tokenizer.json"
    return set(read_json(file)["model"]["vocab"] if file.is_file() else read_json(tokenizer / "vocab.json"))


def compare(base: ShapesResult, trained: ShapesResult) -> Comparison:
    """Trained minus base on the same prompts; UserError if they are not the same prompts in the same order."""
    if [row.prompt for row in base.verdicts] != [row.prompt for row in trained.verdicts]:
        raise UserError("the two results are on different prompts; evaluate both on the same prompts, split and seed")
    return Comparison(
        lenient=_differences(base, trained, strict=False), strict=_differences(base, trained, strict=True)
    )


def _differences(base: ShapesResult, trained: ShapesResult, *, strict: bool) -> Differences:
    before, after = by_tag(base.verdicts), by_tag(trained.verdicts)
    tags = {tag: paired_difference(_marks(before[tag], strict), _marks(after[tag], strict)) for tag in before}
    return Differences(mean_of(list(tags.values())), tags)


def by_tag(verdicts: Iterable[ImageVerdict]) -> dict[str, list[ImageVerdict]]:
    """The verdicts of each tag that occurs, tags in the world's order."""
    rows: dict[str, list[ImageVerdict]] = {tag: [] for tag in TAGS}
    for verdict in verdicts:
        rows[verdict.tag].append(verdict)
    return {tag: of_tag for tag, of_tag in rows.items() if of_tag}


def _marks(rows: Iterable[ImageVerdict], strict: bool) -> list[bool]:
    return [row.strict if strict else row.correct for row in rows]


def print_table(
    base: ShapesResult,
    trained: ShapesResult | None = None,
    *,
    console: Console | None = None,
    labels: tuple[str, str] = ("base", "trained"),
) -> None:
    """Print the lenient and the strict table, in percent with 95 % intervals."""
    out = console or make_console()
    for strict in (False, True):
        out.print(table(base, trained, strict=strict, labels=labels))


def table(
    base: ShapesResult,
    trained: ShapesResult | None = None,
    *,
    strict: bool,
    labels: tuple[str, str] = ("base", "trained"),
) -> Table:
    """One row per tag and one for their mean: one model's scores, or base, trained model and their difference."""
    title = "strict (nothing else is there)" if strict else "lenient (what was asked for is there)"
    # Narrow enough for 80 columns: "n" is the number of images.
    heading = f"{base.SUITE}, {title}, %, 95 % intervals"
    rows = Table(title=heading, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("tag", "n", *((*labels, "difference") if trained else ("score",))):
        rows.add_column(column, justify="left" if column == "tag" else "right", no_wrap=True)
    results = [base, trained] if trained else [base]
    scores = [result.shares(strict=strict) for result in results]
    changes = trained.minus(base) if trained else None
    differences = (changes.strict if strict else changes.lenient) if changes else None
    for tag, (_, total) in scores[0].counts.items():
        cells = [share(part.tags[tag]) for part in scores] + ([change(differences.tags[tag])] if differences else [])
        rows.add_row(tag, str(total), *cells)
    rows.add_section()
    cells = [share(part.overall) for part in scores] + ([change(differences.overall)] if differences else [])
    rows.add_row("mean", str(_total(scores[0])), *cells, style="bold")
    return rows


def share(part: Interval) -> Text:
    """A table's cell: a share."""
    return styled(f"{100 * part.value:.1f} [{100 * part.low:.1f} {100 * part.high:.1f}]")


def change(part: Interval, *, less_is_better: bool = False) -> Text:
    """A table's cell: a difference, coloured where it is told from chance."""
    text = f"{100 * part.value:+.1f} [{100 * part.low:+.1f} {100 * part.high:+.1f}]"
    if not part.excludes_zero:
        return styled(text)
    return styled(text, "green" if (part.value > 0) != less_is_better else "red")


def _total(scores: Scores) -> int:
    return sum(total for _, total in scores.counts.values())
