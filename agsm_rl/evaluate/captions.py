"""Grids of images with a line or more of text under each: the prompt, the seed, the model that drew it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from agsm_rl.evaluate.drawing import to_picture

SMALLEST, LARGEST = 128, 512
"""Pixels of a cell's width: small images are enlarged, large ones reduced."""
MAX_LINES = 4
"""Lines of a caption that are shown."""
GAP = 6
INK = (20, 20, 20)


def captioned_grid(
    images: Tensor, captions: Sequence[str], *, columns: int, titles: Sequence[str] = (), tallest: int | None = None
) -> Image.Image:
    """Images [B, 3, H, W] in [0, 1] in rows of `columns`, each above its caption; `titles` are above the columns.

    Rows that could make the grid taller than `tallest` pixels are left out; one row always stays.
    """
    height, width = images.shape[2:]
    scale = max(1.0, SMALLEST // width) if width < LARGEST else LARGEST / width
    size = (round(width * scale), round(height * scale))
    letters = max(11, size[0] // 20)
    lines = [wrapped(caption, size[0], size=letters) for caption in captions]
    high = line_height(letters)
    tallest_row = size[1] + MAX_LINES * high + GAP
    shown = len(images) if tallest is None else min(len(images), columns * max(1, tallest // tallest_row - 1))
    rows = [range(start, min(start + columns, shown)) for start in range(0, shown, columns)]
    texts = [max(len(lines[index]) for index in row) * high for row in rows]
    top = high + GAP if titles else 0
    sheet = Image.new(
        "RGB", (columns * (size[0] + GAP) + GAP, top + sum(texts) + len(rows) * (size[1] + GAP) + GAP), "white"
    )
    for column, title in enumerate(titles):
        write_lines(
            sheet, wrapped(title, size[0], size=letters, most=1), GAP + column * (size[0] + GAP), GAP // 2, size=letters
        )
    y = top + GAP
    for row, text_height in zip(rows, texts, strict=True):
        for column, index in enumerate(row):
            x = GAP + column * (size[0] + GAP)
            sheet.paste(to_picture(images[index]).resize(size, _filter(scale)), (x, y))
            write_lines(sheet, lines[index], x, y + size[1], size=letters)
        y += size[1] + text_height + GAP
    return sheet


def _filter(scale: float) -> Image.Resampling:
    return Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS


def wrapped(text: str, width: int, *, size: int, most: int = MAX_LINES) -> list[str]:
    """The text in lines of at most `width` pixels, in letters of a size; of more than `most` lines, the rest is cut."""
    lines: list[str] = []
    font, rest = _font(size), " ".join(text.split())
    while rest and len(lines) < most:
        count = len(rest)
        while count > 1 and font.getlength(rest[:count]) > width:
            count = min(count - 1, max(1, int(count * width / font.getlength(rest[:count]))))
        if count < len(rest) and (space := rest.rfind(" ", 0, count + 1)) > 0:
            count = space
        lines.append(rest[:count])
        rest = rest[count:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-1] + "…"
    return lines


def line_height(size: int) -> int:
    """Pixels from one line to the next."""
    font = _font(size)
    return int(sum(font.getmetrics()) * 1.1) if isinstance(font, ImageFont.FreeTypeFont) else 12


def write_lines(sheet: Image.Image, lines: Sequence[str], left: int, top: int, *, size: int) -> None:
    """Write lines onto a picture: the only place where we draw text."""
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((left, top + number * line_height(size)), line, fill=INK, font=_font(size))


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def stacked(parts: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures one below the other, each under its title."""
    width = max(picture.width for _, picture in parts)
    size = max(13, min(24, width // 60))
    strip = 2 * size
    sheet = Image.new("RGB", (width, sum(picture.height + strip for _, picture in parts)), "white")
    y = 0
    for title, picture in parts:
        write_lines(sheet, wrapped(title, width - 2 * GAP, size=size, most=1), GAP, y + size // 2, size=size)
        sheet.paste(picture, (0, y + strip))
        y += strip + picture.height
    return sheet
