"""Show an evaluation: a table of base against trained, and a grid of their images on the same prompts and noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agsm_rl.evaluate.captions import wrapped, write_lines
from agsm_rl.evaluate.intervals import Interval
from agsm_rl.run.screen import make_console, styled

if TYPE_CHECKING:
    from agsm_rl.evaluate.figures import Scores
    from agsm_rl.evaluate.suites.shapes import ShapesResult

SMALLEST_SIDE = 96
GAP, FRAME, LABEL_HEIGHT, LABEL_SIZE = 8, 3, 40, 11
RIGHT, WRONG, NEUTRAL = (30, 150, 60), (205, 45, 45), (160, 160, 160)
PAPER = (255, 255, 255)


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
    heading = f"shapes, {title}, %, 95 % intervals"
    rows = Table(title=heading, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("tag", "n", *((*labels, "difference") if trained else ("score",))):
        rows.add_column(column, justify="left" if column == "tag" else "right", no_wrap=True)
    results = [base, trained] if trained else [base]
    scores = [result.shares(strict=strict) for result in results]
    changes = trained.minus(base) if trained else None
    change = (changes.strict if strict else changes.lenient) if changes else None
    for tag, (_, total) in scores[0].counts.items():
        cells = [_share(part.tags[tag]) for part in scores] + ([_change(change.tags[tag])] if change else [])
        rows.add_row(tag, str(total), *cells)
    rows.add_section()
    cells = [_share(part.overall) for part in scores] + ([_change(change.overall)] if change else [])
    rows.add_row("mean", str(_total(scores[0])), *cells, style="bold")
    return rows


def picture(
    prompts: Sequence[str],
    base_images: Sequence[Image.Image],
    trained_images: Sequence[Image.Image],
    verdicts: Sequence[tuple[bool | None, bool | None]],
) -> Image.Image:
    """Base (left) and trained (right) image of each prompt, framed in green if correct and in red if not.

    `verdicts` are N pairs (base is correct, trained is correct), preferably strict; None where nothing was judged.
    """
    rows = list(zip(prompts, base_images, trained_images, verdicts, strict=True))
    if not rows:
        raise ValueError("cannot make a picture of zero prompts")
    scale = max(1, SMALLEST_SIDE // base_images[0].width)
    width, height = base_images[0].width * scale, base_images[0].height * scale
    cell = (2 * width + 4 * FRAME + 3 * GAP, height + 2 * FRAME + LABEL_HEIGHT + GAP)
    columns = min(len(rows), 4)
    sheet = Image.new("RGB", (columns * cell[0], -(-len(rows) // columns) * cell[1] + GAP), PAPER)
    for index, (prompt, before, after, right) in enumerate(rows):
        left, top = index % columns * cell[0] + GAP, index // columns * cell[1] + GAP
        for side, (image, is_right) in enumerate(zip((before, after), right, strict=True)):
            shown = image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            sheet.paste(_framed(shown, is_right), (left + side * (width + 2 * FRAME + GAP), top))
        lines = wrapped(prompt, cell[0] - 2 * GAP, size=LABEL_SIZE, most=3)
        write_lines(sheet, lines, left, top + height + 2 * FRAME + 3, size=LABEL_SIZE)
    return sheet


def _framed(image: Image.Image, is_right: bool | None) -> Image.Image:
    color = {True: RIGHT, False: WRONG, None: NEUTRAL}[is_right]
    frame = Image.new("RGB", (image.width + 2 * FRAME, image.height + 2 * FRAME), color)
    frame.paste(image, (FRAME, FRAME))
    return frame


def _share(part: Interval) -> Text:
    return styled(f"{100 * part.value:.1f} [{100 * part.low:.1f} {100 * part.high:.1f}]")


def _change(part: Interval) -> Text:
    text = f"{100 * part.value:+.1f} [{100 * part.low:+.1f} {100 * part.high:+.1f}]"
    if not part.excludes_zero:
        return styled(text)
    return styled(text, "green" if part.value > 0 else "red")


def _total(scores: Scores) -> int:
    return sum(total for _, total in scores.counts.values())
