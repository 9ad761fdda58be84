"""`agsm-rl eval`: draw a target's images (or take existing ones), have a suite judge them, report the scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings, versions
from agsm_rl.evaluate.image_folder import is_image_folder
from agsm_rl.evaluate.measured import without_files
from agsm_rl.evaluate.suite import Result, Suite
from agsm_rl.evaluate.suite_process import EvalOptions, SuiteProcess, TargetImages, is_drawn, is_plain_folder
from agsm_rl.files import write_text
from agsm_rl.run.screen import make_console, tell

__all__ = ["EvalOptions", "evaluate_target"]

OF_TARGET = ("bank", "guidance_bank", "guidance_prompt")
"""Settings that a target to compare with is not drawn by."""
OWN_FLAGS = ("dtype", "resolution")
"""Options of the backbone that have flags of their own; the others are given by --backbone."""
SETTINGS = ("seed", "guidance", "num_steps", "prompt_suffix", "bank", "resolution")
"""What decided the images, of what is also under `drawing`."""


def evaluate_target(
    target: str, suite: Suite, options: EvalOptions, *, json_file: Path | None = None
) -> dict[str, Any]:
    """Measure a target on a suite: print its table, and return (and write) the content of eval.json.

    With `share`, draw and measure only that share of the work and return {}; the same command without it gathers what
    all shares left in `images`. Under `accelerate launch`, the first process gathers.
    """
    _check_options(target, suite, options)
    process = SuiteProcess.begin(suite, options)
    folder, other = options.images, None
    if options.against and is_image_folder(Path(options.against)) and not is_drawn(target):
        other = process.images_of(options.against, folder)  # draw the target with the settings of these
    images = process.images_of(target, folder, like=other)
    if other is None and (options.against or options.compare):
        subfolder = None if folder is None else folder / ("against" if options.against else "base")
        other = process.images_of(options.against, subfolder, like=images)
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


def _without_effect(options: EvalOptions, *, exists: bool, draws: bool) -> list[str]:
    """The options given of how to draw that nothing is drawn by: a target to compare with has no bank and no base."""
    drawing, usual = options.drawing, DrawingSettings()
    of_target = {name: getattr(drawing, name) != getattr(usual, name) for name in OF_TARGET}
    of_target |= {"base": options.base is not None}
    of_any = {name: getattr(drawing, name) is not None for name in ("guidance", "num_steps")}
    of_any |= {name if name in OWN_FLAGS else "backbone": True for name in options.backbone}
    unused = (of_target if exists else {}) | (of_any if not draws else {})
    return [name for name, is_given in unused.items() if is_given]


def _exists(target: str, suite: Suite) -> bool:
    return is_drawn(target) or is_plain_folder(target, suite)


def _check_options(target: str, suite: Suite, options: EvalOptions) -> None:
    if options.against and options.compare:
        raise UserError("--against and --compare: give one, not both; --compare compares with the target's own base.")
    exists = _exists(target, suite)
    draws = not exists or not (options.against is None or _exists(options.against, suite))
    if options.compare and exists:
        raise UserError(f"--compare: {target} has no base; give a target to compare with as --against.")
    if options.drawing.prompt_suffix and exists:
        raise UserError(f"--prompt-suffix: {target} is already drawn; leave the option out.")
    for name in _without_effect(options, exists=exists, draws=draws):
        raise UserError(f"--{name.replace('_', '-')}: has no effect, {target} is already drawn; leave the option out.")
    if options.images is not None and exists and not options.against:
        raise UserError(f"--images {options.images}: {target} is already drawn; leave --images out.")
    if options.share is not None and options.images is None and draws:
        raise UserError("--shard: the shares need a shared folder; give one as --images.")
    if options.images is not None and options.images.exists() and not options.images.is_dir():
        raise UserError(f"--images {options.images}: this is a file; give a folder.")
