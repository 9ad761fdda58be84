"""Reading a recipe's YAML: plain data only, no key twice, errors with their line; and `--set key.path=value`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from agsm_rl.errors import UserError
from agsm_rl.files import read_text

KEYS = {
    "recipe": "seed, steps, backbone",
    "sweep": "recipe, axes, seeds",
    "job": "cell, run, recipe",
    "study": "endpoints",
}
MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
"""Aliases counted as often as they are used: ten lines of YAML can otherwise stand for billions of values."""
MAX_DEPTH = 32
"""Blocks within blocks; a recipe has six."""
MAX_DIGITS = 50
"""Characters of a number. Longer ones take ever longer to read, and nothing takes such a number."""
SHOWN = 200
"""Characters of a `--set` that a message repeats."""
PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
NUMBERS_READ = {
    "tag:yaml.org,2002:int": re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"^([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}
"""YAML 1.1's numbers without those that nobody means: 010 was 8, and 12:30 was 750."""


class _Loader(yaml.SafeLoader):
    """SafeLoader for plain data; refuses long numbers, and a key given twice, of which YAML would keep the last."""

    # A date is a text: no option takes another.
    yaml_implicit_resolvers = {
        first: [
            (tag, NUMBERS_READ.get(tag, pattern))
            for tag, pattern in resolvers
            if tag in PLAIN or tag.endswith(":merge")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in PLAIN
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merging (<<) is not supported; write the keys out", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice, first in line {lines[key]}", key_node.start_mark
                )
            if isinstance(key, Hashable):
                lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: Any) -> Any:
        if node.tag in NUMBERS_READ and len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} digits; at most {MAX_DIGITS} are read", node.start_mark
            )
        return super().construct_scalar(node)


# YAML 1.1 reads 1e-3 as text, because it wants a dot: take it for the number that everybody means.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping in a recipe file (or in a sweep's: `what`); UserError with the line when it is not one."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a {what} is a YAML file, e.g. {path / f'{what}.yaml'}.")
    if not path.exists():
        raise UserError(f"{path}: no such {what} file.{_nearby(path)}")
    data = parse_yaml(read_text(path, max_bytes=MAX_BYTES), where=str(path))
    if not isinstance(data, dict):
        got = "it is empty" if data is None else f"this one holds a {type(data).__name__}"
        raise UserError(f"{path}: a {what} is a mapping of keys ({KEYS[what]}, …); {got}.")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> None:
    """Change `data` in place by `key.path=value` texts; values are YAML, list items are `a.0.b` or `a[0].b`."""
    for override in overrides:
        path, equals, text = override.partition("=")
        where = f"--set {override}" if len(override) <= SHOWN else f"--set {override[:SHOWN]}…"
        keys = split_path(path)
        if not equals or not all(keys) or len(keys) > MAX_DEPTH:
            raise UserError(f"{where}: write it as key.path=value, e.g. --set optimizer.learning_rate=1e-4")
        set_value(data, keys, parse_yaml(text, where=where), where=where)


def split_path(path: str) -> list[str]:
    """The keys of a dotted path; `a[0].b` is `a.0.b`."""
    return re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")


def parse_yaml(text: str, *, where: str) -> Any:
    """The plain data in a YAML text; UserError with the line when it is not YAML, or not plain data."""
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or "not valid YAML"
        if "could not determine a constructor for the tag" in problem:
            problem = "YAML tags (!…) are not allowed: a recipe is plain data"
        raise UserError(f"{where}: {line}{problem}.") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML: it is nested too deeply.") from error
    except Exception as error:  # PyYAML fails on some texts with errors of its own code, such as KeyError
        raise UserError(f"{where}: not valid YAML: {error}") from error
    _count(data, {}, where)
    return data


def _count(value: Any, known: dict[int, int | None], where: str, depth: int = 0) -> int:
    """How many values these are; UserError when they are too many or too deep, or contain themselves."""
    if not isinstance(value, dict | list):
        return 1
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: not valid YAML: it is nested more than {MAX_DEPTH} levels deep.")
    if id(value) not in known:
        known[id(value)] = None  # it is being counted
        children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(child, known, where, depth + 1) for child in children)
    count = known[id(value)]
    if count is None:
        raise UserError(f"{where}: a value contains itself (by an alias, *name); a recipe is a tree.")
    if count > MAX_VALUES:
        raise UserError(f"{where}: with its aliases (*name) written out it has more than {MAX_VALUES:,} values.")
    return count


def set_value(data: dict[str, Any], keys: list[str], value: Any, *, where: str) -> None:
    """Set the value at a path, making the mappings on the way."""
    node: Any = data
    for depth, key in enumerate(keys):
        place = ".".join(keys[:depth]) or "the recipe"
        index = _index(node, key, place=place, where=where)
        if depth == len(keys) - 1:
            node[index] = value
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]


def remove_value(data: dict[str, Any], keys: list[str], *, where: str) -> None:
    """Remove the value at a path; UserError when there is none."""
    node: Any = data
    for depth, key in enumerate(keys):
        index = _index(node, key, place=".".join(keys[:depth]) or "the recipe", where=where)
        if isinstance(node, dict) and index not in node:
            raise UserError(
                f"{where}: there is no '{'.'.join(keys)}' to take out; there are: {', '.join(map(str, node))}."
            )
        if depth == len(keys) - 1:
            del node[index]
            return
        node = node[index]


def _index(node: Any, key: str, *, place: str, where: str) -> Any:
    """The key as the node has it: a position in a list, a number in a schedule, or itself."""
    number = int(key) if re.fullmatch("[0-9]{1,9}", key) else None
    if isinstance(node, list):
        if number is None or number >= len(node):
            raise UserError(
                f"{where}: {place} is a list of {len(node)}; '{key}' is not an index of it (0 is the first)."
            )
        return number
    if not isinstance(node, dict):
        raise UserError(f"{where}: {place} is {node!r}, which has no '{key}'.")
    # A schedule such as {0: 0.0, 100: 1.0} has numbers as keys.
    is_schedule = bool(node) and all(isinstance(known, int) for known in node)
    return number if is_schedule and number is not None else key


def _nearby(path: Path) -> str:
    """The recipes beside a file that is not there, as a hint."""
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = sorted(str(file) for file in folder.glob("*.yaml"))[:8] if folder.is_dir() else []
    return f" Recipes there: {', '.join(names)}." if names else ""
