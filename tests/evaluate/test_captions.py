"""Captions: the text that stands under an image fits it, and every picture of ours is lettered the same way."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from agsm_rl.evaluate.captions import captioned_grid, stacked, wrapped

LONG = "a very long prompt of which a narrow picture can show only the first few words, " * 5


@pytest.mark.parametrize("text", [LONG, "x" * 300, "图" * 200])
def test_lines_are_no_wider_than_the_picture_and_what_is_cut_ends_in_an_ellipsis(text):
    font = ImageFont.load_default(11)
    lines = wrapped(text, 128, size=11, most=3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 128 + font.getlength("…") for line in lines)
    assert text.replace(" ", "").startswith("".join(lines).replace(" ", "")[:-2])


def test_a_short_text_is_whole_on_one_line_and_line_breaks_are_spaces():
    assert wrapped("a red\nstar", 200, size=11) == ["a red star"]
    assert wrapped("", 200, size=11) == []


def test_each_image_has_its_caption_below_it_and_nothing_on_it():
    black_on_grey = torch.full((2, 3, 64, 64), 0.5)
    sheet = np.asarray(captioned_grid(black_on_grey, ["a red star", ""], columns=2).convert("L"))
    dark = np.argwhere(sheet < 100)
    assert len(dark) and dark[:, 0].min() >= 6 + 128, "letters are below the image, which is enlarged to 128 pixels"
    assert dark[:, 1].max() < 6 + 128, "and under the first one only"
    assert (sheet == 128).sum() + (sheet == 127).sum() == 2 * 128 * 128


def test_a_grid_is_no_taller_than_its_file_can_be_and_keeps_whole_rows():
    images = torch.rand(8, 3, 64, 64)
    whole = captioned_grid(images, [LONG] * 8, columns=2)
    cut = captioned_grid(images, [LONG] * 8, columns=2, tallest=whole.height - 1)
    row = whole.height - cut.height
    assert whole.height == 4 * row + 6 and row > 128 and cut.width == whole.width
    assert captioned_grid(images, [LONG] * 8, columns=2, tallest=1).height == row + 6, "one row always stays"


def test_stacked_pictures_stand_under_their_titles():
    parts = [("base", Image.new("RGB", (300, 20), "red")), ("step 9", Image.new("RGB", (200, 30), "red"))]
    sheet = np.asarray(stacked(parts))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() == 300 * 20 + 200 * 30 and sheet.shape[1] == 300
    above = sheet[: int(np.argmax(red.any(1)))]
    assert (above < 100).any(), "the first title is above the first picture"
