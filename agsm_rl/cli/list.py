"""`agsm-rl list`: the names that recipes may use, and the options of one of them."""

from __future__ import annotations

import inspect
import json
import re
import typing
from typing import Annotated, Any

import typer

from agsm_rl import registry
from agsm_rl.errors import unknown_name
from agsm_rl.recipe.options import options_model
from agsm_rl.recipe.shipped import PREFIX, shipped_recipes, shipped_sweeps

SHIPPED = {"recipes": shipped_recipes, "sweeps": shipped_sweeps}
PLAIN = ("builtins", "typing", "abc")
"""Modules of bases that say nothing of options."""


def list_names(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND|NAME]",
            help="objectives, rewards, adapters, sources, views, backbones, recipes or sweeps; or one of the first six "
            "kinds' names, for its options and what they mean.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What recipes may use, the options of each, and the recipes that are shipped."""
    kinds = [*registry.KINDS, *SHIPPED]
    if what is None or what in kinds:
        _print_names({kind: _names_of(kind) for kind in ([what] if what else kinds)}, as_json)
        return
    homes = [kind for kind in registry.KINDS if what in registry.available(kind)]
    if not homes:
        names = [name for kind in registry.KINDS for name in registry.available(kind)]
        raise unknown_name("list", what, "a kind or a registered name", [*kinds, *names])
    found = {kind: _described(registry.load(kind, what, where="list"), f"list {what}") for kind in homes}
    if as_json:
        typer.echo(json.dumps({kind: {"name": what} | one for kind, one in found.items()}, indent=1))
        return
    for kind, one in found.items():
        typer.echo(f"{kind}: {what}\n\n{one['about']}\n\noptions:")
        for option in one["options"]:
            default = f" = {option['default']}" if "default" in option else "  (needed)"
            typer.echo(f"  {option['name']}: {option['type']}{default}")


def _names_of(kind: str) -> list[dict[str, str]]:
    if kind in SHIPPED:
        return [{"name": PREFIX + name, "target": str(file)} for name, file in SHIPPED[kind]().items()]
    entries = registry.available(kind).values()
    return [{"name": entry.name, "target": entry.target, "package": entry.package} for entry in entries]


def _print_names(found: dict[str, list[dict[str, str]]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for kind, rows in found.items():
        typer.echo(f"{kind}:")
        for row in rows:
            typer.echo(f"  {row['name']:<28}{row['target']}")


def _described(found: Any, where: str) -> dict[str, Any]:
    """What the class and its bases say of themselves, and its constructor's arguments, which are a block's options."""
    classes = found.__mro__ if inspect.isclass(found) else [found]
    about = [inspect.cleandoc(one.__doc__) for one in classes if one.__doc__ and one.__module__ not in PLAIN]
    options = []
    for name, field in options_model(found, where=where).model_fields.items():
        option = {"name": name, "type": _in_words(field.annotation)}
        if not field.is_required():
            option["default"] = json.dumps(field.default, default=str)
        options.append(option)
    return {"about": "\n\n".join(about), "options": options}


def _in_words(annotation: Any) -> str:
    """Without constraints, and without the modules in which types stand."""
    (plain,) = typing.get_type_hints(type("", (), {"__annotations__": {"it": annotation}})).values()
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(plain))
