"""The recipes and sweeps shipped with the package: `builtin:<name>` on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
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


NOT_MEASURED = "not measured by us"


@dataclass(frozen=True)
class Header:
    """What the comment at the top of a recipe or sweep says of it."""

    title: str
    """Its first sentence: what the recipe shows."""
    hardware: str
    time: str
    """Empty where nothing is said, because nothing was measured."""
    result: str


def header_of(file: Path) -> Header:
    """The header of a recipe or sweep: lines `# Key: text`, each continued by lines that are indented."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#") for line in takewhile(lambda line: line.startswith("#"), lines)]
    said: dict[str, str] = {}
    key = ""
    for line in comment:
        found = re.match(r" ([A-Z][\w ]+):\s+(.*)", line)
        if found:
            key = found[1]
            said[key] = found[2].strip()
        elif key and line.startswith("   "):
            said[key] += " " + line.strip()
        else:
            key = ""
    together = said.get("Time and result", "")
    elsewhere = f"in {said['Study']}" if "Study" in said else NOT_MEASURED
    result = said.get("Result", together or elsewhere).rstrip(".")
    if NOT_MEASURED in result.lower() and "ublished" in result:
        result = f"{NOT_MEASURED}; published figures in its header"
    title = first_sentence("\n".join(line.strip() for line in comment))
    return Header(title, said.get("Hardware", ""), "" if together else said.get("Time", ""), result)


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
