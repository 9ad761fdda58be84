"""`agsm-rl report`, and where commands may write what they make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from agsm_rl.errors import UserError
from agsm_rl.run.screen import say


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...|SWEEP",
            help="Run folders and files of `agsm-rl eval --json`, or one sweep's folder.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            metavar="FILE.html",
            help="Default: report.html in the run's or the sweep's folder; of several runs, in the current folder; "
            "of one file, the file's name with .html.",
        ),
    ] = None,
    primary: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="A study's primary endpoints, one for each question; p-values are adjusted for their number.",
        ),
    ] = None,
) -> None:
    """Compare runs in one HTML file that needs no network: scores, differences, curves, images, recipes."""
    from agsm_rl.report.page import is_report, write_report

    alone = runs[0] if len(runs) == 1 else Path()
    file = out or (alone.with_suffix(".html") if alone.is_file() else alone / "report.html")
    if out is not None or file.is_dir():
        check_output_file(file, option="-o")
    for run in runs:
        if file.exists() and run.exists() and file.samefile(run):
            raise UserError(f"-o {file}: this is one of the files to report; give another file.")
    if file.exists() and not is_report(file):
        raise UserError(f"{file}: exists and was not written by `agsm-rl report`; choose another file by -o.")
    write_report(runs, file, primary)
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
