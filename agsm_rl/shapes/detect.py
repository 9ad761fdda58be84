"""Find the shapes in a drawing: colour segmentation, connected components, and templates fitted to each.

The detector is deterministic and rejects rather than guesses: a blob that no template explains well (blurred, merged,
cut off, of an unclear colour) is reported as rejected, never as the nearest shape.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from agsm_rl.shapes.look import SHAPES_LOOK, Look, outlines

Picture = Image.Image | np.ndarray | Tensor

MIN_LEAD = 0.025
"""How much better the best template must fit than the best of another shape."""
MAX_AT_BORDER = 3
"""Pixels that a whole shape may have in the outermost row or column; drawings touch it with a tip or a circle's top."""
MIN_AREA = 4
"""Blobs of fewer pixels are specks: antialiased tips and noise, neither objects nor rejected."""
RADII = np.arange(3.0, 9.1, 0.2)
SOFTNESS = (0.0, 0.45)
"""Blur (sigma in pixels) of the templates: as drawn, and as an autoencoder gives it back."""
STEPS = 4
"""Template centres are placed on a grid of 1/STEPS pixels."""
HALF = 12
"""Half the width of a template's patch: room for the largest radius."""


@dataclass(frozen=True)
class Found:
    """A clean object: centre and size of its bounding box in pixels, and how well its template fits (0 to 1)."""

    shape: str
    color: str
    x: float
    y: float
    width: float
    height: float
    score: float
    radius: float = 0.0
    """The template's, in pixels."""


@dataclass(frozen=True)
class Rejected:
    """Something in the image that is not a clean object; centre and area in pixels, and what is wrong with it."""

    x: float
    y: float
    area: float
    reason: str


@dataclass(frozen=True)
class Detection:
    """All that was found in an image, from the best fit down."""

    objects: tuple[Found, ...]
    rejected: tuple[Rejected, ...]


def detect(image: Picture, look: Look = SHAPES_LOOK) -> Detection:
    """Clean objects and rejected blobs of one image: PIL, uint8 [H, W, 3], or float [3, H, W] in [0, 1]."""
    from skimage.measure import label, regionprops  # here and below: who only names the judge need not wait for it
    from skimage.segmentation import expand_labels

    background = np.array(look.background, dtype=np.float32)
    inks = background - np.array(list(look.colors.values()), dtype=np.float32)
    strength = np.linalg.norm(inks, axis=1)
    ink = background - as_pixels(image, look.image_size)
    # How far each pixel is on the way from the background to each named colour, and how far it is off that way.
    cover = ink @ (inks / strength[:, None] ** 2).T
    color = np.argmax(cover * strength, axis=-1)
    there = np.linalg.norm(ink, axis=-1) / strength[color]
    reader = _Reader(look, inks, ink, cover, color)

    objects: list[Found] = []
    rejected: list[Rejected] = []
    explained = np.zeros(there.shape, dtype=bool)
    seeds = label(np.where(there > 0.5, color + 1, 0), background=0, connectivity=2)
    areas = expand_labels(seeds, distance=1.5)
    for blob in regionprops(seeds):
        if blob.area < MIN_AREA:
            continue
        mask = areas == blob.label
        explained |= mask
        for found in reader.read_blob(seeds == blob.label, mask):
            if isinstance(found, Found):
                objects.append(found)
            else:
                rejected.append(found)
    rejected += _smudges(there, explained)
    return Detection(tuple(sorted(objects, key=lambda item: -item.score)), tuple(rejected))


def as_pixels(image: Picture, size: int) -> np.ndarray:
    """The image as float32 [size, size, 3] in 0 to 255; other sizes are averaged over boxes.

    ValueError if it is not finite: a diverged model must not read as a blank drawing.
    """
    if isinstance(image, Tensor):
        if not image.isfinite().all():
            raise ValueError("the image has values that are not finite")
        values = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255
        if values.shape[:2] == (size, size):
            return values
        image = Image.fromarray(np.round(values).astype(np.uint8))
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)


@dataclass(frozen=True)
class _Reader:
    """Reads the blobs of one picture; arrays as `detect` makes them."""

    look: Look
    inks: np.ndarray
    ink: np.ndarray
    cover: np.ndarray
    color: np.ndarray

    def read_blob(self, seed: np.ndarray, mask: np.ndarray) -> list[Found | Rejected]:
        """What one connected blob is: an object, several objects that touch at their tips, or nothing clean."""
        from skimage.measure import label
        from skimage.segmentation import expand_labels

        whole = self._fit(seed, mask)
        if isinstance(whole, Found):
            return [whole]
        # Neighbours whose tips share a pixel: cut where the paint is thin, and believe it only if every part is clean.
        name = int(np.bincount(self.color[seed]).argmax())
        parts = label(seed & (self.cover[..., name] > 0.65), connectivity=1)
        sizes = np.bincount(parts.ravel())[1:]
        kept = [number + 1 for number, size in enumerate(sizes) if size >= MIN_AREA]
        if len(kept) < 2:
            return [whole]
        territory = expand_labels(parts * np.isin(parts, kept), distance=2.5) * mask
        fits = [self._fit(parts == number, territory == number) for number in kept]
        return list(fits) if all(isinstance(fit, Found) for fit in fits) else [whole]

    def _fit(self, seed: np.ndarray, mask: np.ndarray) -> Found | Rejected:
        """The template that explains a blob, or why none does. `seed`: its sure pixels; `mask`: those and the rim."""
        look, shapes = self.look, self.look.shapes
        name = int(np.bincount(self.color[seed]).argmax())
        cover = self.cover[..., name]
        paint = np.where(mask, np.clip(cover, 0, 1), 0)
        total = float(paint.sum())
        rows, columns = np.indices(paint.shape)
        x, y = float((paint * (columns + 0.5)).sum() / total), float((paint * (rows + 0.5)).sum() / total)

        def reject(reason: str) -> Rejected:
            return Rejected(x, y, total, reason)

        core = seed & (cover >= min(0.85, float(np.median(cover[seed]))))
        if np.linalg.norm(self.ink[core].mean(axis=0) - self.inks[name]) > look.max_color_error:
            return reject("its colour is unclear")
        sure = seed & (cover > 0.5)
        if max(sure[0].sum(), sure[-1].sum(), sure[:, 0].sum(), sure[:, -1].sum()) > MAX_AT_BORDER:
            return reject("it is cut off by the border")
        fits, radii = _overlaps(paint, x, y, total, shapes)
        best, second = (int(i) for i in np.argsort(-fits)[:2])
        if fits[best] < look.min_fit[shapes[best]]:
            return reject("it is not a clean shape")
        if fits[best] - fits[second] < MIN_LEAD:
            return reject(f"it could be a {shapes[best]} or a {shapes[second]}")
        corners = np.array(outlines(shapes[best], x, y, float(radii[best]))[0])
        (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        color = list(look.colors)[name]
        return Found(shapes[best], color, *box, score=float(fits[best]), radius=float(radii[best]))


def _overlaps(
    paint: np.ndarray, x: float, y: float, total: float, shapes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Best soft IoU of each shape with the paint around its centre of mass, and the radius that gives it."""
    column, row = int(np.floor(x)), int(np.floor(y))
    patch = np.pad(paint, HALF)[row : row + 2 * HALF + 1, column : column + 2 * HALF + 1]
    bank = _templates(int((x - column) * STEPS), int((y - row) * STEPS), shapes)
    shared = np.minimum(bank, patch).sum(axis=(-2, -1))
    either = bank.sum(axis=(-2, -1)) + total - shared
    fits = (shared / either).max(axis=2)
    best = fits.argmax(axis=1)
    return fits.max(axis=1), RADII[best]


@lru_cache(maxsize=2 * STEPS * STEPS)
def _templates(column: int, row: int, shapes: tuple[str, ...]) -> np.ndarray:
    """Templates [shape, radius, softness, patch, patch] centred in the given cell of the sub-pixel grid."""
    from scipy.ndimage import gaussian_filter

    scale, width = 8, 2 * HALF + 1
    x, y = HALF + (column + 0.5) / STEPS, HALF + (row + 0.5) / STEPS
    sharp = np.empty((len(shapes), len(RADII), width, width), dtype=np.float32)
    for i, shape in enumerate(shapes):
        for j, radius in enumerate(RADII):
            canvas = Image.new("L", (width * scale, width * scale))
            for index, corners in enumerate(outlines(shape, x * scale, y * scale, radius * scale)):
                ImageDraw.Draw(canvas).polygon(corners, fill=0 if index else 255)
            sharp[i, j] = np.asarray(canvas.resize((width, width), Image.Resampling.BOX), dtype=np.float32) / 255
    return np.stack([gaussian_filter(sharp, (0, 0, blur, blur)) if blur else sharp for blur in SOFTNESS], axis=2)


def _smudges(there: np.ndarray, explained: np.ndarray) -> list[Rejected]:
    """Faint or tiny leavings that belong to no blob but are too much to be noise."""
    from skimage.measure import label, regionprops

    leavings = label((there > 0.25) & ~explained, connectivity=2)
    return [
        Rejected(blob.centroid[1] + 0.5, blob.centroid[0] + 0.5, float(blob.area), "a faint smudge")
        for blob in regionprops(leavings)
        if blob.area >= 2 * MIN_AREA
    ]
