"""`agsm-rl eval` on images that are kept: draw them (or take them as they are), measure each, report the scores."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import versions
from agsm_rl.evaluate.image_folder import is_image_folder
from agsm_rl.evaluate.suite import Result, Suite
from agsm_rl.evaluate.suite_process import OnDiskOptions, SuiteProcess, TargetImages, is_drawn, is_plain_folder
from agsm_rl.evaluate.suites.geneval import RESULTS, GenEvalResult, write_results
from agsm_rl.files import write_text
from agsm_rl.run.screen import make_console, tell

__all__ = ["OnDiskOptions", "evaluate_on_disk"]


def evaluate_on_disk(
    target: str, suite: Suite, options: OnDiskOptions, *, json_file: Path | None = None
) -> dict[str, Any]:
    """Measure a target on a suite; prints its table, and returns (and writes) eval.json's content.

    With a share of the work (`share`), only that share is drawn and measured, and {} is returned; the same command
    without it gathers what all shares left in `images`. Under `accelerate launch`, the first process gathers.
    """
    _check_options(target, suite, options)
    process = SuiteProcess.begin(suite, options)
    with _image_folder(options) as folder:
        other = None
        if options.against and is_image_folder(Path(options.against)) and not is_drawn(target):
            other = process.images_of(options.against, folder)  # what is drawn is drawn as these were
        images = process.images_of(target, folder, like=other)
        if other is None and (options.against or options.compare):
            subfolder = folder / ("against" if options.against else "base")
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
        f"share {process.options.share} is drawn and measured. When all shares are, `agsm-rl eval {folder} --suite "
        f"{process.suite.name}` (or this command without --shard) prints the scores.",
    )


def _stdout() -> Console:
    """A pipe or a file gets whole tables, however wide; a terminal shortens what does not fit."""
    console = make_console()
    return console if console.is_terminal else make_console(width=10_000)


def _results(images: TargetImages, other: TargetImages | None, process: SuiteProcess) -> dict[str, Any]:
    """Print the tables, write results.jsonl, and return eval.json's content."""
    result = _result(images, process)
    result_of_other = None if other is None else _result(other, process)
    result.show(_stdout(), result_of_other)
    content = result.to_json() | _description(images) | {"versions": versions()}
    if other is not None and result_of_other is not None:
        content["base" if process.options.compare else "other"] = result_of_other.to_json() | _description(other)
        content |= {"same_noise": _same_noise(images, other), **result.against(result_of_other)}
    return content


def _same_noise(images: TargetImages, other: TargetImages) -> bool:
    """Whether both are known to have been drawn from the same noise."""
    ours, theirs = images.drawing, other.drawing
    return ours is not None and theirs is not None and all(ours[key] == theirs[key] for key in ("seed", "resolution"))


def _make_relative(content: dict[str, Any], folder: Path) -> None:
    """Name the images' files from the JSON's folder, so that both can be moved together."""
    for part in (content, content.get("base", {}), content.get("other", {})):
        for row in part.get("images", []):
            if "filename" in row and Path(row["filename"]).exists():
                row["filename"] = os.path.relpath(row["filename"], folder)


def _result(images: TargetImages, process: SuiteProcess) -> Result:
    if images.results is not None:
        return images.results
    result = process.suite.result(images.images)
    if isinstance(result, GenEvalResult) and images.folder is not None:
        write_results(result, images.folder / RESULTS)
    return result


def _description(images: TargetImages) -> dict[str, Any]:
    """Which target, and what decided its images; null where another tool drew them and did not say."""
    drawing = images.drawing or {}
    settings = {key: drawing.get(key) for key in ("seed", "guidance", "num_steps", "prompt_suffix", "resolution")}
    return {"target": images.name, **settings, "drawing": images.drawing}


def _check_options(target: str, suite: Suite, options: OnDiskOptions) -> None:
    if options.against and options.compare:
        raise UserError("--against and --compare: give one of them; --compare compares with the target's own base.")
    exists = is_drawn(target) or is_plain_folder(target, suite)
    if options.compare and exists:
        raise UserError(f"--compare: {target} has no base; name what to compare with by --against.")
    if options.drawing.prompt_suffix and exists:
        raise UserError(f"--prompt-suffix: {target} is drawn already; leave it out.")
    if options.images is not None and exists and not options.against:
        raise UserError(f"--images {options.images}: {target} is drawn already; leave --images out.")
    if options.share is not None and options.images is None and not exists:
        raise UserError("--shard: the shares need a folder to meet in; name it by --images.")
    if options.images is not None and options.images.exists() and not options.images.is_dir():
        raise UserError(f"--images {options.images}: there is a file of that name; give a folder.")


@contextmanager
def _image_folder(options: OnDiskOptions) -> Iterator[Path]:
    """The folder for drawn images; removed afterwards unless it was named."""
    if options.images is not None:
        yield options.images
        return
    with tempfile.TemporaryDirectory(prefix="agsm-rl-eval-") as folder:
        yield Path(folder)
