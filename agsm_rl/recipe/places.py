"""Whether the files and folders that a recipe names are there, answered without loading diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agsm_rl.backbones.checkpoint_names import find_checkpoint
from agsm_rl.errors import MistakesSoFar, UserError
from agsm_rl.export.exported_files import find_exports
from agsm_rl.files import local_or_hub
from agsm_rl.recipe.recipe import Recipe

PLACES = ("checkpoint", "unet", "transformer", "lora", "config")
"""Options of backbones that name a file, a folder or a repository on the hub."""


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
            from agsm_rl.recipe.teachers import check_teacher  # loads diffusers

            with mistakes.collected():
                check_teacher(recipe, term.options["teacher"], f"objectives[{index}].teacher")
    mistakes.raise_any()


@contextmanager
def located(where: str) -> Iterator[None]:
    """Within the block, UserErrors of modules that do not know the recipe are given its file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
