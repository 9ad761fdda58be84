"""Descriptions of registered classes and their options, read from docstrings, for `agsm-rl list` and the reference.

A class documents its constructor's arguments in an `Args:` section, as `name: text` (or `name, name: text`). Arguments
that it does not document are looked up in its base classes.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from agsm_rl.recipe.options import Section, options_model
from agsm_rl.source_code import passed_on

SECTION = re.compile(r"\n*^Args:\n((?:[ \t].*\n?|\n)*)", re.M)
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): ", re.M)
COMMON = {"seed": "Random seed. Null: the recipe's seed."}
"""Options with the same meaning everywhere, unless a class documents them itself."""


@dataclass(frozen=True)
class Option:
    """An option of a block: its type in words, its default as JSON (None: it is required), and its meaning."""

    name: str
    type: str
    default: str | None
    meaning: str

    def to_json(self) -> dict[str, str]:
        """The option as plain data; a required option has no default."""
        default = {} if self.default is None else {"default": self.default}
        return {"name": self.name, "type": self.type, **default, "meaning": self.meaning}


def about(documented: Any) -> str:
    """The docstring of a class or function without its `Args:` section."""
    return SECTION.sub("", inspect.cleandoc(documented.__doc__ or "")).strip()


def options_of(registered: Any, *, where: str) -> list[Option]:
    """The options of a registered class or function, in the order of its signature."""
    return _options(options_model(registered, where=where), COMMON | _meanings(registered))


def keys_of(section: type[Section]) -> list[Option]:
    """The keys of a section of a recipe."""
    return _options(section, _meanings(section))


def _options(section: type[Section], meanings: dict[str, str]) -> list[Option]:
    options = []
    for name, field in section.model_fields.items():
        default = None if field.is_required() else json.dumps(field.default, default=_plain)
        options.append(Option(name, in_words(field.annotation), default, meanings.get(name, "")))
    return options


def _plain(default: Any) -> Any:
    """A section's default is an empty mapping, since all its keys have defaults."""
    return {} if isinstance(default, Section) else str(default)


def in_words(annotation: Any) -> str:
    """A type in words for people who write YAML: `int or null`, `live or ema`, `dict[str, float]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return in_words(arguments[0])
    if origin is Literal:
        return " or ".join(_choice(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in arguments))
    if arguments:
        parts = ", ".join("…" if part is Ellipsis else in_words(part) for part in arguments)
        return f"{getattr(origin, '__name__', origin).lower()}[{parts}]".replace("mapping[", "dict[")
    if annotation in (None, types.NoneType):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "mapping"
    name, module = getattr(annotation, "__name__", str(annotation)), getattr(annotation, "__module__", "builtins")
    return name.lower() if module in ("builtins", "pathlib", "typing") else f"{module}.{name}"


def _choice(value: Any) -> str:
    """A value as it is written in YAML: a string that looks like a number is quoted."""
    return f'"{value}"' if re.fullmatch(r"[\d.]+", str(value)) and isinstance(value, str) else str(value)


def _meanings(documented: Any) -> dict[str, str]:
    """By argument; what is nearest to the class or function counts."""
    meanings: dict[str, str] = {}
    for part in reversed(documented.__mro__ if inspect.isclass(documented) else [documented]):
        kinds, others = passed_on(vars(part).get("__init__") if inspect.isclass(part) else part)
        meanings |= _meanings_by_kind(kinds)
        for documenting in (*others, part):
            meanings |= _documented(documenting)
    return meanings


def _meanings_by_kind(kinds: Mapping[str, Any]) -> dict[str, str]:
    """What the options of single kinds mean to each of them, since kinds may share a name but not its default."""
    meanings: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        for option, text in _documented(kind).items():
            meanings.setdefault(option, []).append(f"`{name}`: {text}")
    return {option: " ".join(texts) for option, texts in meanings.items()}


def _documented(part: Any) -> dict[str, str]:
    section = SECTION.search(inspect.cleandoc(part.__doc__ or "") + "\n")
    _, *entries = ENTRY.split(section[1]) if section else [""]
    meanings: dict[str, str] = {}
    for names, text in zip(entries[::2], entries[1::2], strict=True):
        meanings |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return meanings
