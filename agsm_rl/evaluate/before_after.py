"""A picture of a model's images beside its base's, on the same prompts and noise."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from agsm_rl.evaluate.captions import wrapped, write_lines

SMALLEST_SIDE = 96
GAP, FRAME, LABEL_HEIGHT, LABEL_SIZE = 8, 3, 40, 11
RIGHT, WRONG, NEUTRAL = (30, 150, 60), (205, 45, 45), (160, 160, 160)
PAPER = (255, 255, 255)


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
