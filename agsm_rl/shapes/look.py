"""How a drawn world looks: its shapes and colours, the outlines of the shapes, and the drawing of objects.

The judge reads pictures by the same description, so that a world's drawings and its verdicts cannot drift apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from PIL import Image, ImageDraw

from agsm_rl.shapes import scenes
from agsm_rl.shapes.scenes import DrawnObject

Polygon = list[tuple[float, float]]

SCALE = 8
"""How many times larger a drawing is drawn."""


@dataclass(frozen=True)
class Look:
    """The look of a world.

    Attributes:
        shapes: The names of its shapes.
        colors: Its colours by name, RGB from 0 to 255.
        min_fit: Least soft intersection over union of a blob with its template, by shape (detect.py).
        max_color_error: Largest distance (RGB) of a blob's colour from a named one: half that of the nearest two.
    """

    shapes: tuple[str, ...]
    colors: Mapping[str, tuple[int, int, int]]
    min_fit: Mapping[str, float]
    max_color_error: float
    image_size: ClassVar[int] = scenes.IMAGE_SIZE
    """Width and height of a drawing in pixels."""
    background: ClassVar[tuple[int, int, int]] = scenes.BACKGROUND
    """The colour behind the objects."""

    def render(self, objects: Sequence[DrawnObject]) -> Image.Image:
        """The RGB drawing of objects, antialiased by drawing them larger."""
        canvas = Image.new("RGB", (self.image_size * SCALE, self.image_size * SCALE), self.background)
        pen = ImageDraw.Draw(canvas)
        for item in objects:
            polygons = outlines(item.shape, item.x * SCALE, item.y * SCALE, item.radius * SCALE)
            for index, corners in enumerate(polygons):
                pen.polygon(corners, fill=self.background if index else self.colors[item.color])
        return canvas.resize((self.image_size, self.image_size), Image.Resampling.BOX)


SHAPES_LOOK = Look(
    scenes.SHAPES,
    scenes.COLORS,
    # A little below the worst autoencoded drawing's. A circle's is high, since a square on its corner still reaches
    # 0.85 as one; a star's is low, since an autoencoder rounds its tips off.
    min_fit={"circle": 0.87, "square": 0.86, "triangle": 0.85, "star": 0.80},
    max_color_error=55.0,
)
"""The look of the shapes world."""


def outlines(shape: str, x: float, y: float, radius: float) -> list[Polygon]:
    """The polygon of a shape around its centre of mass, and those of its holes after it."""
    if shape not in _UNIT_OUTLINES:
        return [scenes.outline(shape, x, y, radius)]
    return [[(x + radius * a, y + radius * b) for a, b in polygon] for polygon in _unit(shape)]


@cache
def box_offset(shape: str) -> tuple[float, float]:
    """How far the centre of a shape's bounding box is from its centre of mass, for radius 1."""
    xs, ys = zip(*outlines(shape, 0.0, 0.0, 1.0)[0], strict=True)
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


@cache
def _unit(shape: str) -> list[Polygon]:
    """The polygons of a shape of radius 1, moved so that the centre of mass is at the origin."""
    polygons = _UNIT_OUTLINES[shape]()
    x, y = _center(polygons[0])
    return [[(a - x, b - y) for a, b in polygon] for polygon in polygons]


def _center(polygon: Polygon) -> tuple[float, float]:
    """The centre of mass of a polygon."""
    area = x = y = 0.0
    for (a, b), (c, d) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        cross = a * d - c * b
        area, x, y = area + cross / 2, x + (a + c) * cross / 6, y + (b + d) * cross / 6
    return x / area, y / area


def _arc(radius: float, first: float, last: float, corners: int, x: float = 0.0) -> Polygon:
    """Points on a circle around (x, 0), from one angle in degrees to another."""
    angles = [math.radians(first + (last - first) * i / (corners - 1)) for i in range(corners)]
    return [(x + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _cross() -> list[Polygon]:
    arm, half = 1.0, 0.32
    quarter = [(half, -arm), (half, -half), (arm, -half)]
    corners = []
    for turn in range(4):
        cos, sin = round(math.cos(turn * math.pi / 2)), round(math.sin(turn * math.pi / 2))
        corners += [(cos * a - sin * b, sin * a + cos * b) for a, b in quarter]
    return [corners]


def _heart() -> list[Polygon]:
    corners = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((math.sin(t) ** 3, -height / 16))
    return [corners]


_UNIT_OUTLINES = {
    "cross": _cross,
    "ring": lambda: [_arc(1.0, 0, 360, 49), _arc(0.5, 0, 360, 49)],
    "heart": _heart,
    "moon": lambda: [_arc(1.0, 50, 310, 40) + _arc(0.78, 260, 100, 30, x=0.55)],
}
