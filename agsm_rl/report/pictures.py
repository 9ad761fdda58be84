"""A few of the suite's images as drawn by base and variants from the same noise, with the judge's verdicts.

A variant is shown by its first seed. Images are re-encoded, so that only pixels get into the page; equal ones (the
base's, in every run) are stored once.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from agsm_rl.evaluate.image_folder import open_picture
from agsm_rl.report.eval_file import OF_SUITE, EvalFile, Judged
from agsm_rl.report.load import Loaded, Run
from agsm_rl.report.views import BASE, measured_of
from agsm_rl.run.folder import RunFolder

LARGEST = 192
"""Pixels of the longer side; larger images are scaled down."""
SHEET = 1536
"""The same for a sample grid."""
LOSSLESS = 96
"""Up to this size images are PNG; above, WebP is a tenth of it."""
MOST_IMAGES, FEWEST_PROMPTS = 400, 8


def pictures(loaded: Loaded) -> dict[str, Any]:
    """`prompts` (number, text, tag), `images` (id → data URI) and `shown` (guidance → model → one entry per prompt).

    An entry is {image, verdicts…, reason}; a model whose run kept no images has none.
    """
    images: dict[str, str] = {}
    first = loaded.evaluation
    numbers = _numbers(first, _prompts_shown(loaded))
    shown: dict[str, dict[str, Any]] = {}
    for variant in loaded.variants:
        run = variant.runs[0]
        for guidance in measured_of(variant):
            models = shown.setdefault(f"{guidance:g}", {})
            for name, side in ((BASE, "base"), (variant.name, "trained")):
                entries = [] if name in models else _entries(run, guidance, side, numbers, images)
                if any(entries):
                    models[name] = entries
    prompts = [{"prompt": first.prompts[number], "tag": first.tags[number]} for number in numbers]
    return {"prompts": prompts, "images": images, "shown": {key: models for key, models in shown.items() if models}}


def sheets(loaded: Loaded) -> list[tuple[str, str]]:
    """Where nothing was evaluated: each variant's sample grid as a data URI, base above trained or the newest."""
    grids = []
    for variant in loaded.variants if not loaded.evaluated else ():
        run = variant.runs[0]
        steps = sorted(RunFolder(run.path).samples.glob("step-*.png"), reverse=True)
        files = [_inside(run, f"samples/{name}") for name in ("before_after.png", *(step.name for step in steps))]
        grids += [(variant.name, _data_uri(file, largest=SHEET)) for file in files if file is not None][:1]
    return grids


def _prompts_shown(loaded: Loaded) -> int:
    """The number of prompts to show: fewer if there are many variants."""
    models = sum(len(measured_of(variant)) for variant in loaded.variants) + len(loaded.guidances)
    if not models:
        return 0
    return min(16, len(loaded.evaluation.prompts), max(FEWEST_PROMPTS, MOST_IMAGES // models))


def _numbers(evaluation: EvalFile, count: int) -> list[int]:
    """The images that are shown: the first ones; of a suite that goes tag by tag, prompts' first ones, tags in turn."""
    if evaluation.suite not in OF_SUITE:
        return list(range(count))
    firsts: dict[tuple[str, str], int] = {}
    for number, asked in enumerate(zip(evaluation.tags, evaluation.prompts, strict=True)):
        firsts.setdefault(asked, number)
    by_tag = [[number for (tag, _), number in firsts.items() if tag == name] for name in evaluation.tag_names]
    in_turn = [number for turn in zip_longest(*by_tag) for number in turn if number is not None]
    return in_turn[:count]


def _entries(
    run: Run, guidance: float, side: str, numbers: Sequence[int], images: dict[str, str]
) -> list[dict[str, Any] | None]:
    judged: Judged = getattr(run.evaluation, side)[guidance]
    entries: list[dict[str, Any] | None] = []
    for number in numbers:
        path = _file(run, guidance, side, judged, number)
        if path is None:
            entries.append(None)
            continue
        uri = _data_uri(path)
        name = hashlib.sha256(uri.encode()).hexdigest()[:12]
        images[name] = uri
        verdicts = {key: bool(marks[number]) for key, marks in judged.marks.items()}
        entries.append({"image": name, "reason": judged.reasons[number]} | verdicts)
    return entries


def _file(run: Run, guidance: float, side: str, judged: Judged, number: int) -> Path | None:
    """An image's file in the run's folder; None if there is none."""
    name = f"samples/eval/guidance-{guidance:g}/{side}/{number:04d}.png"
    return _inside(run, judged.files[number] if judged.files else name)


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
