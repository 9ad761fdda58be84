"""The recipes that come with the package: `builtin:<name>` on the command line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from agsm_rl.errors import unknown_name

PREFIX = "builtin:"


def shipped_recipes() -> dict[str, Path]:
    """Name → file; a recipe in a folder is named `folder/name`."""
    spec = find_spec("agsm_rl_recipes")
    # Run from a clone that is not installed, the recipes lie beside the package.
    folder = Path(spec.origin).parent if spec and spec.origin else Path(__file__).parents[1] / "recipes"
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def recipe_path(given: str) -> Path:
    """The file of a recipe: a path, or `builtin:<name>`."""
    if not given.startswith(PREFIX):
        return Path(given)
    recipes = {PREFIX + name: file for name, file in shipped_recipes().items()}
    if given not in recipes:
        raise unknown_name("RECIPE", given, "a shipped recipe", recipes)
    return recipes[given]
