"""Whether the files and folders that a recipe names are there, answered without loading diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agsm_rl.backbones.checkpoint_names import ALLOWED, find_checkpoint, is_single_file
from agsm_rl.errors import MistakesSoFar, UserError
from agsm_rl.export.exported_files import find_exports
from agsm_rl.files import local_or_hub, local_path
from agsm_rl.recipe.recipe import Recipe

REPLACING = ("unet", "transformer", "lora", "config")
"""Options of backbones that change what a checkpoint is; each names a file, a folder or a repository on the hub."""
PLACES = ("checkpoint", *REPLACING)
"""All options of backbones that do."""


def check_places(recipe: Recipe, *, fresh: bool = True) -> None:
    """UserError for files and folders that are not there: all of them, before any hub is asked for anything."""
    parts, mistakes = recipe.parts, MistakesSoFar(recipe.parts.where)
    for key in PLACES:
        name = recipe.backbone.options.get(key)
        if isinstance(name, str) and name.startswith("builtin:"):
            with mistakes.collected():
                find_checkpoint(name, where=parts.at(f"backbone.{key}"))
        elif isinstance(name, str):
            with mistakes.collected():
                allowed = "another path, or a name on the hub (owner/name)"
                local_or_hub(name, where=f"{parts.at(f'backbone.{key}')}:", allowed=allowed)
    if fresh and recipe.start_from is not None:
        with mistakes.collected(), located(parts.at("start_from")):
            find_exports(Path(recipe.start_from))
    for index, term in enumerate(recipe.objectives):
        if isinstance(term.options.get("teacher"), str):
            with mistakes.collected():
                _check_teacher(recipe, term.options["teacher"], f"objectives[{index}].teacher")
    mistakes.raise_any()


def _check_teacher(recipe: Recipe, teacher: str, place: str) -> None:
    """UserError for a teacher that is not there, or that would teach nothing; no hub is asked."""
    if not is_checkpoint(teacher, where=recipe.parts.at(place)):
        with located(recipe.parts.at(place)):
            find_exports(Path(teacher))
        return
    options = recipe.backbone.options
    if "checkpoint" not in options:
        raise recipe.parts.refuse(
            place, f"'{teacher}' is a checkpoint, but the backbone '{recipe.backbone.use}' loads none; give a run"
        )
    changed = any(options.get(key) is not None for key in REPLACING)
    if not changed and _same(teacher, str(options["checkpoint"])):
        raise recipe.parts.refuse(
            place, f"'{teacher}' is this run's own base; leave it out, and the teacher is the base at no cost in memory"
        )


def is_checkpoint(teacher: str, *, where: str) -> bool:
    """Whether a teacher is a checkpoint, and not a run or exported adapters; UserError if it is none of them."""
    if teacher.startswith("builtin:"):
        find_checkpoint(teacher, where)
        return True
    path = local_path(teacher)
    if path.exists():
        return is_single_file(path) or (path / "model_index.json").is_file()
    local_or_hub(teacher, where=f"{where}:", allowed=f"a run folder, exported adapters, or a checkpoint: {ALLOWED}")
    return True


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


@contextmanager
def located(where: str) -> Iterator[None]:
    """Within the block, UserErrors of modules that do not know the recipe are given its file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
