"""Sweeps of the first version, whose cells contain a hash of their settings instead of the settings.

The other files of that version (each cell's job and recipe, sweep.json) suggest what the settings were, and the hash
confirms it. The settings are then added to the cell's files, before any of the other files is written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from agsm_rl.errors import UserError
from agsm_rl.evaluate.kept_files import read_kept
from agsm_rl.files import read_json, write_text
from agsm_rl.recipe.yaml_file import read_yaml
from agsm_rl.sweep.kept import Result, Trained
from agsm_rl.sweep.settings import Settings

HEADER = "# Fully resolved: every default is written out. `seed: null` in a block means the recipe's seed.\n"
"""The first line of that version's recipe.yaml, which is part of a hash."""


def add_settings(sweep: Path) -> None:
    """Add the settings to every cell.json and trained.json in a sweep's folder whose hash confirms them."""
    for run in sorted((sweep / "cells").glob("*/")):
        for name, shape, hash_of, key in (
            ("cell.json", Result, fingerprint, "fingerprint"),
            ("trained.json", Trained, training_fingerprint, "recipe"),
        ):
            file = run / name
            content = read_kept(file, shape)
            if "settings" in content or key not in content:
                continue
            settings = next((guess for guess in _candidates(sweep, run) if hash_of(guess) == content[key]), None)
            if settings is not None:
                write_text(file, json.dumps({"settings": settings.to_json()} | content, indent=1) + "\n")


def fingerprint(settings: Settings) -> str:
    """The hash in cell.json."""
    return _digest([repr(settings.recipe), settings.limit, settings.evaluations, settings.reported])


def training_fingerprint(settings: Settings) -> str:
    """The hash in trained.json."""
    recipe = settings.recipe | {"evaluate": None}
    text = HEADER + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
    return _digest({"recipe": text, "limit": settings.limit})


def _candidates(sweep: Path, run: Path) -> Iterator[Settings]:
    """A cell's settings according to its job, then according to its recipe and the summary.

    Missing and damaged files are skipped.
    """
    for read in (_of_job, _of_summary):
        try:
            settings = read(sweep, run)
        except (UserError, LookupError, TypeError, AttributeError):
            continue
        yield settings


def _of_job(sweep: Path, run: Path) -> Settings:
    job = read_yaml(sweep / "jobs" / f"{run.name}.yaml", "job")
    return _settings(job["recipe"], job["evaluations"], job["reported"], job["seconds"])


def _of_summary(sweep: Path, run: Path) -> Settings:
    summary = read_json(sweep / "sweep.json")
    evaluations = [{"suite": section["suite"], "every": None} | section for section in summary["evaluate"]]
    recipe = read_yaml(run / "recipe.yaml")
    return _settings(recipe, evaluations, summary["reported"], (summary["budget"] or {}).get("seconds"))


def _settings(recipe: dict[str, Any], evaluations: list[Any], reported: str | None, seconds: float | None) -> Settings:
    return Settings(recipe, {"steps": recipe["steps"], "seconds": seconds}, evaluations, reported)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
