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
from agsm_rl.shipped import PREFIX, shipped_recipes, shipped_sweeps

SHIPPED = {"recipes": shipped_recipes, "sweeps": shipped_sweeps}


def list_names(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND|NAME]",
            help="objectives, rewards, adapters, sources, views, backbones, recipes or sweeps; or one of the names, "
            "for its options and what they mean.",
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
    found = {kind: _described(registry.load(kind, what, where="list")) for kind in homes}
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


def _described(found: Any) -> dict[str, Any]:
    """What the class says of itself, and its constructor's arguments, which are a block's options."""
    types = typing.get_type_hints(found.__init__ if inspect.isclass(found) else found)
    options = []
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        option = {"name": parameter.name, "type": _in_words(parameter.name, types.get(parameter.name, Any))}
        if parameter.default is not parameter.empty:
            option["default"] = json.dumps(parameter.default, default=str)
        options.append(option)
    return {"about": inspect.getdoc(found) or "", "options": options}


def _in_words(name: str, annotation: Any) -> str:
    if name == "rewards":
        return "{name: weight, or options}"
    # Without the modules in which types stand.
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation))
