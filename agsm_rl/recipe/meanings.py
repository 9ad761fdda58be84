"""What a registered class and its options mean, read from docstrings: for `agsm-rl list` and the reference pages.

A class explains its constructor's arguments in an `Args:` section, a line `name: text` each (`name, name: text` for
several). What it leaves out is looked for in its base classes.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from agsm_rl.recipe.options import Section, options_model

SECTION = re.compile(r"\n*^Args:\n((?:[ \t].*\n?|\n)*)", re.M)
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): ", re.M)
COMMON = {"seed": "Seed of its random numbers. Null is the recipe's seed."}
"""Options that mean the same everywhere, where a class does not say more."""


@dataclass(frozen=True)
class Option:
    """An option of a block: its type in words, its default as JSON (None: it must be given), and its meaning."""

    name: str
    type: str
    default: str | None
    meaning: str

    def to_json(self) -> dict[str, str]:
        """Without a default where there is none."""
        default = {} if self.default is None else {"default": self.default}
        return {"name": self.name, "type": self.type, **default, "meaning": self.meaning}


def about(found: Any) -> str:
    """What a class or function says of itself, without the list of its arguments."""
    return SECTION.sub("", inspect.cleandoc(found.__doc__ or "")).strip()


def options_of(found: Any, *, where: str) -> list[Option]:
    """The options of a registered class or function, in the order of its signature."""
    return _options(options_model(found, where=where), COMMON | _meanings(found))


def keys_of(section: type[Section]) -> list[Option]:
    """The keys of a part of a recipe."""
    return _options(section, _meanings(section))


def _options(section: type[Section], meanings: dict[str, str]) -> list[Option]:
    options = []
    for name, field in section.model_fields.items():
        default = None if field.is_required() else json.dumps(field.default, default=_plain)
        options.append(Option(name, in_words(field.annotation), default, meanings.get(name, "")))
    return options


def _plain(default: Any) -> Any:
    """A section's default is that of its own keys: an empty mapping gives it."""
    return {} if isinstance(default, Section) else str(default)


def in_words(annotation: Any) -> str:
    """A type as somebody who writes YAML reads it: `int or null`, `live or ema`, `dict[str, float]`."""
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
    """A value as YAML has it: text that would be read as a number stands in quotes."""
    return f'"{value}"' if re.fullmatch(r"[\d.]+", str(value)) and isinstance(value, str) else str(value)


def _meanings(found: Any) -> dict[str, str]:
    classes = found.__mro__ if inspect.isclass(found) else [found]
    meanings: dict[str, str] = {}
    for one in reversed(classes):
        section = SECTION.search(inspect.cleandoc(one.__doc__ or "") + "\n")
        _, *entries = ENTRY.split(section[1]) if section else [""]
        for names, text in zip(entries[::2], entries[1::2], strict=True):
            meanings |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return meanings
