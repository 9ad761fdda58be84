"""Grids of images with a line or more of text under each: the prompt, the seed, the model that drew it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from agsm_rl.evaluate.drawing import to_picture

SMALLEST, LARGEST = 128, 512
"""Pixels of a cell's width: small images are enlarged, large ones reduced."""
MAX_LINES = 4
"""Lines of a caption that are shown."""
GAP = 6


def captioned_grid(images: Tensor, captions: Sequence[str], *, columns: int, titles: Sequence[str] = ()) -> Image.Image:
    """Images [B, 3, H, W] in [0, 1] in rows of `columns`, each above its caption; `titles` stand above the columns."""
    height, width = images.shape[2:]
    scale = max(1.0, SMALLEST // width) if width < LARGEST else LARGEST / width
    size = (round(width * scale), round(height * scale))
    font = ImageFont.load_default(max(11, size[0] // 20))
    line_height = int(sum(font.getmetrics()) * 1.1) if isinstance(font, ImageFont.FreeTypeFont) else 12
    lines = [_wrapped(caption, font, size[0]) for caption in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    texts = [max(len(lines[index]) for index in row) * line_height for row in rows]
    top = line_height + GAP if titles else 0
    sheet = Image.new(
        "RGB", (columns * (size[0] + GAP) + GAP, top + sum(texts) + len(rows) * (size[1] + GAP) + GAP), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((GAP + column * (size[0] + GAP), GAP // 2), title, fill="black", font=font)
    y = top + GAP
    for row, text_height in zip(rows, texts, strict=True):
        for column, index in enumerate(row):
            x = GAP + column * (size[0] + GAP)
            sheet.paste(to_picture(images[index]).resize(size, _filter(scale)), (x, y))
            for number, line in enumerate(lines[index]):
                pen.text((x, y + size[1] + number * line_height), line, fill="black", font=font)
        y += size[1] + text_height + GAP
    return sheet


def _filter(scale: float) -> Image.Resampling:
    return Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels; what does not fit into MAX_LINES is cut."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < MAX_LINES:
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


def stacked(parts: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures one below the other, each under its title."""
    size = max(13, min(24, max(picture.width for _, picture in parts) // 60))
    font = ImageFont.load_default(size)
    strip = 2 * size
    width, height = max(picture.width for _, picture in parts), sum(picture.height + strip for _, picture in parts)
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for title, picture in parts:
        pen.text((GAP, y + size // 2), title, fill="black", font=font)
        sheet.paste(picture, (0, y + strip))
        y += strip + picture.height
    return sheet
