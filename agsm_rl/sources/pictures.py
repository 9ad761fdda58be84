"""Pictures as strangers keep them, brought to what the models learn from: upright RGB of 8 bits on white.

Everything that reads an image file goes through here, so that training and evaluation see the same pixels.
"""

from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from agsm_rl.errors import UserError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "QOI", "AVIF")
"""What is decoded, whatever a file's name says. Pillow would hand others, such as PostScript, to other programs."""
SUFFIXES = frozenset(
    [".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"]
    + [".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".ico", ".jp2", ".j2k", ".jpx", ".qoi"]
)
"""How the names of image files end, in lower case."""

SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations whose upright picture has height and width exchanged."""
STREAMED_FROM = ("hf", "zip", "tar")
"""Where the images of a streamed data set are; a row that names another address would have it asked."""


def read_picture(value: Any, where: str) -> Image.Image:
    """An image file's bytes or path, what `datasets` keeps of an image, or a PIL image, as upright RGB on white.

    UserError, which names `where`, for what cannot be read.
    """
    try:
        return upright_rgb(_opened(value))
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: its image cannot be read (it is not an image file); fix or remove it") from error
    except Exception as error:  # whatever a decoder makes of a stranger's bytes
        raise UserError(f"{where}: its image cannot be read ({error}); fix or remove it") from error


def picture_size(value: Any, where: str) -> tuple[int, int]:
    """Height and width of an image that `read_picture` takes, upright, from its header alone; UserError likewise."""
    try:
        picture = _opened(value)
        # A PNG would be decoded as a whole to look for an orientation behind its pixels, where none is written.
        turned = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    except Exception as error:  # whatever a decoder makes of a stranger's bytes
        raise UserError(f"{where}: its image cannot be read ({error}); fix or remove it") from error
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def upright_rgb(picture: Image.Image) -> Image.Image:
    """The first frame in RGB, turned as its EXIF data say, transparent pixels on white.

    ValueError for numbers whose range is not known (modes I and F).
    """
    picture = _eight_bits(ImageOps.exif_transpose(picture))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    # A transparent pixel's own colour is hidden from whoever looks at the picture: nobody has seen it.
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture.convert("RGBA"))
    return canvas.convert("RGB")


def _opened(value: Any) -> Image.Image:
    if isinstance(value, Mapping):
        value = value.get("bytes") or _of_path(str(value.get("path") or ""))
    if isinstance(value, bytes | bytearray | memoryview):
        return Image.open(BytesIO(value), formats=_formats())
    if isinstance(value, Path):
        if value.exists() and not value.is_file():  # opening a named pipe would block forever
            raise ValueError(f"{value} is not a regular file")
        return Image.open(value, formats=_formats())
    if isinstance(value, Image.Image):
        return value
    raise ValueError(f"it holds {value!r:.60}")


def _of_path(path: str) -> Path | bytes:
    """A local path; the content of a URL that `datasets` gives for a streamed file (hf://…, zip://…)."""
    if "://" not in path:
        return Path(path)
    for place in path.split("::"):
        if "://" in place and place.partition("://")[0] not in STREAMED_FROM:
            raise ValueError(f"it is to be fetched from {path:.100}, but only files here and on the hub are read")
    import fsspec

    with fsspec.open(path) as file:
        return bytes(file.read())


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits as 8, which `convert` would clip to white; ValueError for numbers without a known range."""
    if picture.mode.startswith("I;16"):
        import numpy as np  # the command line, which names files only, does without

        numbers = np.asarray(picture)
        grey = Image.fromarray((numbers // 257).astype(np.uint8))
        transparent = picture.info.get("transparency")  # one grey, in 16 bits
        if isinstance(transparent, int):
            grey.putalpha(Image.fromarray(np.where(numbers == transparent, 0, 255).astype(np.uint8)))
        return grey
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}, whose range is not known; save it with 8 or 16 bits")
    return picture
