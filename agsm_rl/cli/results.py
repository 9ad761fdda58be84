"""The commands that show the results of a training: sample and report (`eval` is in eval.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from agsm_rl.cli.options import (
    BankOption,
    BaseOption,
    GuidanceBankOption,
    GuidanceOption,
    GuidancePromptOption,
    StepsOption,
    TargetArgument,
)
from agsm_rl.errors import UserError
from agsm_rl.registry import permissions
from agsm_rl.run.screen import say, without_loading_bars
from agsm_rl.training.limits import MAX_SEED


def sample(
    target: TargetArgument,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    number: Annotated[int, typer.Option("-n", min=1, help="How many pictures.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Picture i is drawn from the noise of seed + i.")] = 0,
    out: Annotated[Path, typer.Option("-o", help="Folder for the pictures.")] = Path("samples"),
    guidance: GuidanceOption = None,
    num_steps: StepsOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time.")] = 8,
    bank: BankOption = "positive",
    guidance_bank: GuidanceBankOption = None,
    guidance_prompt: GuidancePromptOption = None,
    base: BaseOption = None,
    allow_import: Annotated[
        list[str] | None,
        typer.Option("--allow-import", metavar="MODULE", help="Let TARGET use code from this module. Repeatable."),
    ] = None,
) -> None:
    """Draw pictures."""
    from agsm_rl.evaluate.drawing import draw, to_picture, write_picture
    from agsm_rl.evaluate.target import open_target

    without_loading_bars()
    check_output_folder(out, option="-o")
    opened = open_target(target, base=base, allow_imports=permissions(imports=allow_import))
    with opened.using(bank, guidance_bank, guidance_prompt):
        for start in range(0, number, batch_size):
            seeds = [seed + index for index in range(start, min(start + batch_size, number))]
            images = draw(
                opened.backbone,
                [prompt] * len(seeds),
                seeds,
                guidance=opened.guidance if guidance is None else guidance,
                num_steps=num_steps or opened.num_steps,
                batch_size=batch_size,
            )
            for image, seed_of_image in zip(images, seeds, strict=True):
                path = out / f"seed-{seed_of_image}.png"
                write_picture(to_picture(image), path)
                say(str(path))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...|SWEEP", help="Run folders, or one sweep's folder.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            metavar="FILE.html",
            help="Default: report.html in the run's or the sweep's folder; of several runs, in the current folder.",
        ),
    ] = None,
) -> None:
    """Compare runs in one HTML file that needs no network: scores, differences, curves, images, recipes."""
    from agsm_rl.report.page import write_report

    file = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if out is not None or file.is_dir():
        check_output_file(file, option="-o")
    write_report(runs, file)
    say(str(file))


def check_output_file(file: Path, *, option: str) -> None:
    """UserError, before anything is computed, if the file cannot be written."""
    if file.is_dir():
        raise UserError(f"{option} {file}: this is a folder; give a file.")
    parent = file.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {parent}.")
    _check_writable(parent, f"{option} {file}")


def check_output_folder(folder: Path, *, option: str) -> None:
    """UserError, before anything is computed, if the folder does not exist and cannot be created."""
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{option} {folder}: {place} is a file; give a folder.")
            _check_writable(place, f"{option} {folder}")
            return


def _check_writable(folder: Path, where: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{where}: {folder} is not writable (permission denied, or a read-only disk).")
