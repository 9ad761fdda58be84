"""A few of a suite's images as drawn by base and variants from the same noise, with what they are worth.

They are the suite's first images, and those that a variant changed most, for better and for worse, as far as the run
kept them. A variant is shown by its first seed. Images are re-encoded, so that only pixels get into the page; equal
ones (the base's, in every run) are stored once.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from agsm_rl.evaluate.image_folder import open_picture
from agsm_rl.report.eval_file import PROMPTS_OF, EvalFile
from agsm_rl.report.load import Loaded, Variant
from agsm_rl.report.runs import Run
from agsm_rl.report.views import BASE, measured_of
from agsm_rl.run.folder import RunFolder

LARGEST = 192
"""Pixels of the longer side; larger images are scaled down."""
SHEET = 1536
"""The same for a sample grid."""
LOSSLESS = 96
"""Up to this size images are PNG; above, WebP is a tenth of it."""
MOST_IMAGES, FEWEST_PROMPTS = 400, 8
CHANGES = 8
"""Of each variant, score and guidance: at most this many largest gains, and as many losses."""
MOST_CHANGED = 48
"""Images that are shown because they changed, over all variants; fewer if there are many of these."""


def pictures(loaded: Loaded) -> dict[str, Any]:
    """`prompts` (number, text, tag, first), `images` (id → data URI) and `shown` (guidance → model → entries).

    An entry is {image, a figure by each score, reason}; a model whose run kept no images has none. `kept`: of how many
    images the first variant's run kept the picture, of `total`.
    """
    images: dict[str, str] = {}
    evaluation = loaded.evaluation
    first = _first(evaluation, _prompts_shown(loaded))
    numbers = list(dict.fromkeys([*first, *_changed(loaded)]))
    shown: dict[str, dict[str, Any]] = {}
    for variant in loaded.variants:
        run = variant.runs[0]
        for guidance in measured_of(variant):
            models = shown.setdefault(f"{guidance:g}", {})
            sides = [(BASE, "base")] if guidance in run.evaluation.base else []
            for name, side in (*sides, (variant.name, "trained")):
                entries = _entries(loaded.suite, run, guidance, side, numbers, images)
                if any(entries):
                    models[name] = _joined(models.get(name), entries)
    prompts = [
        {"prompt": evaluation.prompts[number], "tag": evaluation.tags[number], "first": number in first}
        for number in numbers
    ]
    return {
        "prompts": prompts,
        "images": images,
        "shown": {key: models for key, models in shown.items() if models},
        "kept": max(
            (len(_kept(loaded.suite, variant, measured_of(variant)[0])) for variant in loaded.variants), default=0
        ),
        "total": len(evaluation.images),
    }


def sheets(loaded: Loaded) -> list[tuple[str, str]]:
    """Where no image was measured: each variant's sample grid as a data URI, base above trained or the newest."""
    grids = []
    for variant in loaded.all_variants if not loaded.evaluated else ():
        run = variant.runs[0]
        steps = sorted(RunFolder(run.path).samples.glob("step-*.png"), reverse=True) if run.file is None else []
        files = [_inside(run, f"samples/{name}") for name in ("before_after.png", *(step.name for step in steps))]
        grids += [(variant.name, _data_uri(file, largest=SHEET)) for file in files if file is not None][:1]
    return grids


def _prompts_shown(loaded: Loaded) -> int:
    """The number of first prompts to show: fewer if there are many variants."""
    models = sum(len(measured_of(variant)) for variant in loaded.variants) + len(loaded.guidances)
    if not models:
        return 0
    return min(16, len(loaded.evaluation.images), max(FEWEST_PROMPTS, MOST_IMAGES // models))


def _first(evaluation: EvalFile, count: int) -> list[int]:
    """The first images; of a suite that goes tag by tag, or has several per row, each prompt's first, tags in turn."""
    if evaluation.suite not in PROMPTS_OF and not any(image.number for image in evaluation.images):
        return list(range(count))
    firsts: dict[tuple[str, str], int] = {}
    for number, asked in enumerate(zip(evaluation.tags, evaluation.prompts, strict=True)):
        firsts.setdefault(asked, number)
    by_tag = [[number for (tag, _), number in firsts.items() if tag == name] for name in evaluation.tag_names]
    in_turn = [number for turn in zip_longest(*by_tag) for number in turn if number is not None]
    return in_turn[:count]


def _changed(loaded: Loaded) -> list[int]:
    """The images that a variant changed most among those kept, gains and losses of all variants in turn."""
    rankings = [ranking for variant in loaded.variants for ranking in _rankings(loaded, variant)]
    in_turn = [number for turn in zip_longest(*rankings) for number in turn if number is not None]
    models = sum(len(measured_of(variant)) for variant in loaded.variants) + len(loaded.guidances)
    return list(dict.fromkeys(in_turn))[: max(CHANGES, min(MOST_CHANGED, MOST_IMAGES // max(models, 1)))]


def _rankings(loaded: Loaded, variant: Variant) -> Iterator[list[int]]:
    evaluation = variant.runs[0].evaluation
    for guidance in measured_of(variant):
        if guidance not in evaluation.base:
            continue
        kept = _kept(loaded.suite, variant, guidance)
        for name in loaded.evaluation.scores:
            before, after = evaluation.base[guidance].values[name], evaluation.trained[guidance].values[name]
            change = after.astype(float) - before
            order = sorted(kept, key=lambda number: change[number])
            yield [number for number in order[: -CHANGES - 1 : -1] if change[number] > 0]
            yield [number for number in order[:CHANGES] if change[number] < 0]


def _kept(suite: str, variant: Variant, guidance: float) -> list[int]:
    """The images of which both the base's and the trained model's picture were kept."""
    run = variant.runs[0]
    sides = ["base", "trained"] if guidance in run.evaluation.base else ["trained"]
    numbers = range(len(run.evaluation.images))
    return [number for number in numbers if all(_file(suite, run, guidance, side, number) for side in sides)]


def _joined(before: list[Any] | None, entries: list[Any]) -> list[Any]:
    """The base's entries, where an earlier variant's run did not keep an image that this one kept."""
    return entries if before is None else [one or other for one, other in zip(before, entries, strict=True)]


def _entries(
    suite: str, run: Run, guidance: float, side: str, numbers: Sequence[int], images: dict[str, str]
) -> list[dict[str, Any] | None]:
    judged = getattr(run.evaluation, side)[guidance]
    entries: list[dict[str, Any] | None] = []
    for number in numbers:
        path = _file(suite, run, guidance, side, number)
        if path is None:
            entries.append(None)
            continue
        uri = _data_uri(path)
        name = hashlib.sha256(uri.encode()).hexdigest()[:12]
        images[name] = uri
        figures = {key: judged.values[key][number].item() for key in run.evaluation.scores}
        entries.append({"image": name, "reason": judged.reasons[number]} | figures)
    return entries


def _file(suite: str, run: Run, guidance: float, side: str, number: int) -> Path | None:
    """An image's file in the run's folder; None if there is none."""
    evaluation = run.evaluation
    judged, image = getattr(evaluation, side)[guidance], evaluation.images[number]
    if judged.files:
        return _inside(run, judged.files[number])
    if image.number or run.file is not None:
        return None
    place = "samples/eval" if evaluation.first_of_run else f"samples/eval/{suite}"
    return _inside(run, f"{place}/guidance-{guidance:g}/{side}/{image.row:04d}.png")


def _inside(run: Run, name: str) -> Path | None:
    """The file, if it exists inside the run's folder; names and links that lead elsewhere give None."""
    try:
        path = run.path / name
        return path if path.resolve().is_relative_to(run.path.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, links in a circle
        return None


def _data_uri(path: Path, *, largest: int = LARGEST) -> str:
    picture = open_picture(path)
    small = max(picture.size) <= LOSSLESS
    picture.thumbnail((largest, largest))
    file = BytesIO()
    if small:
        picture.save(file, format="PNG", optimize=True)
    else:
        picture.save(file, format="WEBP", quality=85)
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
