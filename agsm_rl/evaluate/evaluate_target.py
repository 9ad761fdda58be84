"""`agsm-rl eval`: draw a target's images (or take existing ones), have a suite judge them, report the scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from agsm_rl.evaluate.draw_folder import versions
from agsm_rl.evaluate.eval_checks import check_options
from agsm_rl.evaluate.image_folder import is_image_folder
from agsm_rl.evaluate.measured import without_files
from agsm_rl.evaluate.suite import Result, Suite
from agsm_rl.evaluate.suite_process import EvalOptions, SuiteProcess, TargetImages, is_drawn
from agsm_rl.files import write_text
from agsm_rl.run.screen import make_console, tell

__all__ = ["EvalOptions", "evaluate_target"]

SETTINGS = ("seed", "guidance", "num_steps", "prompt_suffix", "bank", "resolution")
"""What decided the images, of what is also under `drawing`."""


def evaluate_target(
    target: str, suite: Suite, options: EvalOptions, *, json_file: Path | None = None
) -> dict[str, Any]:
    """Measure a target on a suite: print its table, and return (and write) the content of eval.json.

    With `share`, draw and measure only that share of the work and return {}; the same command without it gathers what
    all shares left in `images`. Under `accelerate launch`, the first process gathers.
    """
    check_options(target, suite, options)
    process = SuiteProcess.begin(suite, options)
    folder, other = options.images, None
    if options.against and is_image_folder(Path(options.against)) and not is_drawn(target):
        other = process.images_of(options.against, folder, is_other=True)  # draw the target with the settings of these
    images = process.images_of(target, folder, like=other)
    if other is None and (options.against or options.compare):
        subfolder = None if folder is None else folder / ("against" if options.against else "base")
        other = process.images_of(options.against, subfolder, like=images, is_other=True)
    process.wait()
    if not process.gathers:
        if options.share is not None:
            _tell_share(target, process)
        return {}
    content = _results(images, other, process)
    if json_file is not None:
        _make_relative(content, json_file.parent)
        write_text(json_file, json.dumps(content, indent=1) + "\n")
    return content


def _tell_share(target: str, process: SuiteProcess) -> None:
    folder = process.options.images or target
    tell(
        process.console,
        f"share {process.options.share} is done. When all shares are done, `agsm-rl eval {folder} --suite "
        f"{process.suite.name}` (or this command without --shard) prints the scores.",
    )


def _stdout() -> Console:
    """Pipes and files get tables in full width; a terminal shortens what does not fit."""
    console = make_console()
    return console if console.is_terminal else make_console(width=10_000)


def _results(images: TargetImages, other: TargetImages | None, process: SuiteProcess) -> dict[str, Any]:
    """Print the tables, write results.jsonl, and return eval.json's content."""
    result = process.result(images)
    result_of_other = None if other is None else process.result(other)
    console = _stdout()
    result.show(console, result_of_other, labels=("base" if process.options.compare else "other", "this"))
    if other is not None:
        label = "base" if process.options.compare else "other"
        tell(console, f"this: {images.name}; {label}: {other.name}")
    content = _figures(result, images) | {"versions": versions()}
    form = {key: getattr(process.options.drawing, key) for key in ("guidance_bank", "guidance_prompt")}
    content |= {key: value for key, value in form.items() if value is not None}
    if other is not None and result_of_other is not None:
        content["base" if process.options.compare else "other"] = _figures(result_of_other, other)
        content |= {"same_noise": _same_noise(images, other), **result.against(result_of_other)}
    return content


def _figures(result: Result, images: TargetImages) -> dict[str, Any]:
    content = result.to_json() | _description(images)
    if images.judged and "images" in content and not any(item.filename for item in images.judged):
        content["images"] = without_files(content["images"])
    return content


def _same_noise(images: TargetImages, other: TargetImages) -> bool:
    """Whether both are known to be drawn from the same noise."""
    ours, theirs = images.drawing, other.drawing
    return ours is not None and theirs is not None and all(ours[key] == theirs[key] for key in ("seed", "resolution"))


def _make_relative(content: dict[str, Any], folder: Path) -> None:
    """Make the images' file names relative to the JSON file, so that both can be moved together."""
    for part in (content, content.get("base", {}), content.get("other", {})):
        for row in part.get("images", []):
            if "filename" in row and Path(row["filename"]).exists():
                row["filename"] = os.path.relpath(row["filename"], folder)
            if "filenames" in row and all(Path(file).exists() for file in row["filenames"]):
                row["filenames"] = [os.path.relpath(file, folder) for file in row["filenames"]]


def _description(images: TargetImages) -> dict[str, Any]:
    """The target, and what decided its images; null if another tool drew them without recording it."""
    drawing = images.drawing or {}
    settings = {key: drawing.get(key) for key in SETTINGS}
    return {"target": images.name, **settings, "drawing": images.drawing}
