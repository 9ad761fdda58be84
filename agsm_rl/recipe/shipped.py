"""The recipes and sweeps shipped with the package: `builtin:<name>` on the command line."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from agsm_rl.errors import unknown_name
from agsm_rl.files import local_path
from agsm_rl.source_code import first_sentence

PREFIX = "builtin:"
SWEEPS = "study/"
"""The folder of the sweeps; all other files are recipes."""


def shipped_recipes() -> dict[str, Path]:
    """Shipped recipes by name; a recipe in a folder is named `folder/name`."""
    return {name: file for name, file in _shipped().items() if not name.startswith(SWEEPS)}


def shipped_sweeps() -> dict[str, Path]:
    """Shipped sweeps by name, `study/name`."""
    return {name: file for name, file in _shipped().items() if name.startswith(SWEEPS)}


def title_of(file: Path) -> str:
    """The first sentence of the comment at the top of a recipe or sweep."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    return first_sentence("\n".join(line.lstrip("# ") for line in comment))


def _shipped() -> dict[str, Path]:
    spec = find_spec("agsm_rl_recipes")
    # In a clone that is not installed, the recipes are beside the package.
    folder = Path(spec.origin).parent if spec and spec.origin else Path(__file__).parents[2] / "recipes"
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def recipe_path(given: str) -> Path:
    """The file of a recipe or sweep: a path, or `builtin:<name>`."""
    if not given.startswith(PREFIX):
        return local_path(given)
    recipes = {PREFIX + name: file for name, file in _shipped().items()}
    if given not in recipes:
        raise unknown_name("RECIPE", given, "a shipped recipe", recipes)
    return recipes[given]
