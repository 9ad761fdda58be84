"""Reading a recipe's YAML: plain data only, no key twice, errors with their line; and `--set key.path=value`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from agsm_rl.errors import UserError
from agsm_rl.files import check_regular

KEYS = {"recipe": "seed, steps, backbone", "sweep": "recipe, axes, seeds"}
MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
"""Aliases counted as often as they are used: ten lines of YAML can otherwise stand for billions of values."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently keep the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merging (<<) is not supported; write the keys out", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice, first in line {seen[key]}", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-3 as text, because it wants a dot: take it for the number that everybody means.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping in a recipe file (or in a sweep's: `what`); UserError with the line when it is not one."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a {what} is a YAML file, e.g. {path / f'{what}.yaml'}.")
    if path.exists():
        check_regular(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: it has {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such {what} file.{_nearby(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from error
    data = _parse(text, where=str(path))
    if not isinstance(data, dict):
        got = "it is empty" if data is None else f"this one holds a {type(data).__name__}"
        raise UserError(f"{path}: a {what} is a mapping of keys ({KEYS[what]}, …); {got}.")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> None:
    """Change `data` in place by `key.path=value` texts; values are YAML, list items are `a.0.b` or `a[0].b`."""
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = split_path(path)
        if not equals or not all(keys):
            raise UserError(f"--set {override}: write it as key.path=value, e.g. --set optimizer.learning_rate=1e-4")
        set_value(data, keys, _parse(text, where=f"--set {override}"), where=f"--set {override}")


def split_path(path: str) -> list[str]:
    """The keys of a dotted path; `a[0].b` is `a.0.b`."""
    return re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")


def _parse(text: str, *, where: str) -> Any:
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        _count(data, {}, where)
        return data
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or "not valid YAML"
        if "could not determine a constructor for the tag" in problem:
            problem = "YAML tags (!…) are not allowed: a recipe is plain data"
        raise UserError(f"{where}: {line}{problem}.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from error


def _count(value: Any, known: dict[int, int | None], where: str) -> int:
    """How many values these are; UserError when they are too many, or hold themselves."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = None  # it is being counted
        children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(child, known, where) for child in children)
    count = known[id(value)]
    if count is None:
        raise UserError(f"{where}: a value holds itself (by an alias, *name); a recipe is a tree.")
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
    """Take out what stands at a path; UserError when nothing does."""
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
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise UserError(f"{where}: {place} is a list of {len(node)}; '{key}' is no index of it (0 is the first).")
        return int(key)
    if not isinstance(node, dict):
        raise UserError(f"{where}: {place} is {node!r}, which has no '{key}'.")
    # A schedule such as {0: 0.0, 100: 1.0} has numbers as keys.
    numbers = bool(node) and all(isinstance(known, int) for known in node)
    return int(key) if numbers and key.isdigit() else key


def _nearby(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    found = sorted(str(file) for file in folder.glob("*.yaml"))[:8] if folder.is_dir() else []
    return f" Recipes there: {', '.join(found)}." if found else ""
