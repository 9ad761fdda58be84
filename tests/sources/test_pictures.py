"""Pictures as people keep them become what people see: upright, on white, in 8 bits."""

import os
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.sources.pictures import read_picture


def encoded(picture, form="PNG", **options):
    file = BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def palette(color):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, *color] + [0] * 762)
    return picture


TRANSPARENT = {
    "RGBA": encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))),
    "RGBA in webp": encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "WEBP", lossless=True, exact=True),
    "grey with alpha": encoded(Image.new("LA", (4, 4), (10, 0))),
    "a palette with a transparent colour": encoded(palette((255, 0, 0)), transparency=1),
    "RGB with a transparent colour": encoded(Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9)),
    "grey with a transparent shade": encoded(Image.new("L", (4, 4), 9), transparency=9),
    "GIF": encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "GIF"),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_a_transparent_pixel_is_white_whatever_colour_it_hides(kind):
    assert np.array(read_picture(TRANSPARENT[kind], "row 0")).min() == 255


def test_a_half_transparent_pixel_is_mixed_with_white_and_an_opaque_one_stays():
    assert read_picture(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "row").getpixel((0, 0)) == (255, 127, 127)
    assert read_picture(encoded(palette((255, 0, 0))), "row").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_inks_become_the_colours_that_they_print(form):
    red = encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), form)
    assert np.abs(np.array(read_picture(red, "row")).astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_shade(form):
    deep = encoded(Image.fromarray(np.full((4, 4), 32767, np.uint16)), form)
    assert read_picture(deep, "row").getpixel((0, 0)) == (127, 127, 127)


def test_a_file_is_read_by_what_it_holds_and_other_programs_are_not_called(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (4, 4))))
    assert read_picture(tmp_path / "a.jpg", "row").size == (4, 4)
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    with pytest.raises(UserError, match="row: its image cannot be read .it is not an image file"):
        read_picture({"bytes": None, "path": str(tmp_path / "b.png")}, "row")


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises((UserError, ValueError), match="not a regular file"):
        read_picture(tmp_path / "a.png", "row 0")


@pytest.mark.parametrize("path", ["http://127.0.0.1:1/a.png", "file:///etc/hosts", "zip://a.png::http://127.0.0.1:1/x"])
def test_a_row_that_names_another_address_does_not_have_it_asked(path):
    with pytest.raises(UserError, match="only files here and on the hub are read"):
        read_picture({"bytes": None, "path": path}, "row 3")


def test_the_transparent_grey_of_a_picture_of_16_bits_is_white():
    picture = Image.fromarray(np.array([[1000, 40000]], dtype=np.uint16))
    file = BytesIO()
    picture.save(file, "PNG", transparency=1000)
    read = read_picture(file.getvalue(), "row")
    assert [read.getpixel((column, 0)) for column in (0, 1)] == [(255, 255, 255), (155, 155, 155)]
