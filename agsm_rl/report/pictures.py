"""The suite's first images as drawn by base and variants from the same noise, with the judge's verdicts.

A variant is shown by its first seed. Images are read and written anew, so that nothing but pixels gets into the page;
equal ones (the base's, in every run) are kept once.
"""

from __future__ import annotations

import base64
import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from agsm_rl.errors import UserError
from agsm_rl.report.evaluation import Judged
from agsm_rl.report.load import Loaded, Run
from agsm_rl.report.views import BASE, measured_of
from agsm_rl.run_folder import RunFolder

LARGEST = 192
"""Pixels of the longer side; larger images are made smaller."""
LOSSLESS = 96
"""Up to this size images are PNG; above, WebP is a tenth of it."""
MOST_IMAGES, FEWEST_PROMPTS = 400, 8


def pictures(loaded: Loaded) -> dict[str, Any]:
    """`prompts` (number, text, tag), `images` (id → data URI) and `shown` (guidance → model → an entry a prompt).

    An entry is {image, verdicts…, reason}; a model whose run kept no images has none.
    """
    images: dict[str, str] = {}
    count = _prompts_shown(loaded)
    shown: dict[str, dict[str, Any]] = {}
    for variant in loaded.variants:
        run = variant.runs[0]
        for guidance in measured_of(variant):
            folder = RunFolder(run.path).samples / "eval" / f"guidance-{guidance:g}"
            models = shown.setdefault(f"{guidance:g}", {})
            sides = {BASE: ("base", run.evaluation.base), variant.name: ("trained", run.evaluation.trained)}
            for name, (side, judged) in sides.items():
                if name not in models and (folder / side).is_dir():
                    models[name] = _entries(folder / side, run, judged[guidance], count, images)
    first = loaded.evaluation
    prompts = [{"prompt": first.prompts[i], "tag": first.tags[i]} for i in range(count)]
    return {"prompts": prompts, "images": images, "shown": {key: models for key, models in shown.items() if models}}


def _prompts_shown(loaded: Loaded) -> int:
    """Fewer prompts where many variants are to be shown."""
    models = sum(len(measured_of(variant)) for variant in loaded.variants) + len(loaded.guidances)
    return min(16, len(loaded.evaluation.prompts), max(FEWEST_PROMPTS, MOST_IMAGES // models))


def _entries(folder: Path, run: Run, judged: Judged, count: int, images: dict[str, str]) -> list[dict[str, Any] | None]:
    entries: list[dict[str, Any] | None] = []
    for number in range(count):
        path = folder / f"{number:04d}.png"
        if not path.is_file():
            entries.append(None)
            continue
        uri = _data_uri(path)
        name = hashlib.sha256(uri.encode()).hexdigest()[:12]
        images[name] = uri
        verdicts = {key: bool(marks[number]) for key, marks in judged.marks.items()}
        entries.append({"image": name, "reason": judged.reasons[number]} | verdicts)
    return entries


def _data_uri(path: Path) -> str:
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(
            f"{path}: is no image that can be read ({error}); delete it, or evaluate the run again."
        ) from error
    small = max(picture.size) <= LOSSLESS
    picture.thumbnail((LARGEST, LARGEST))
    file = BytesIO()
    if small:
        picture.save(file, format="PNG", optimize=True)
    else:
        picture.save(file, format="WEBP", quality=85)
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
