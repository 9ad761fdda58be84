"""`agsm-rl list`: the names that recipes may use, and the options of one of them."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any

import typer

from agsm_rl import registry
from agsm_rl.errors import unknown_name
from agsm_rl.recipe.meanings import Option, about, options_of
from agsm_rl.recipe.shipped import PREFIX, shipped_recipes, shipped_sweeps
from agsm_rl.run.screen import say

SHIPPED = {"recipes": shipped_recipes, "sweeps": shipped_sweeps}


def list_names(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND|NAME]",
            help="objectives, rewards, adapters, sources, views, suites, backbones, recipes or sweeps; or one of the "
            "first seven kinds' names, for its options and what they mean.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    classes = {kind: registry.load(kind, what, where="list") for kind in homes}
    options = {kind: _options(kind, item, where=f"list {what}") for kind, item in classes.items()}
    if as_json:
        content = {
            kind: {"name": what, "about": about(item), "options": [option.to_json() for option in options[kind]]}
            for kind, item in classes.items()
        }
        say(json.dumps(content, indent=1))
        return
    for kind, item in classes.items():
        _print_meaning(f"{kind}: {what}", about(item), options[kind])


def _options(kind: str, registered: Any, *, where: str) -> list[Option]:
    """The options of what is registered. A reward that is a function has none: its arguments are images and prompts."""
    if kind == "rewards":
        from agsm_rl_rewards.functions import reward_maker

        registered = reward_maker(registered)
    return options_of(registered, where=where)


def _names_of(kind: str) -> list[dict[str, str]]:
    if kind in SHIPPED:
        return [{"name": PREFIX + name, "target": str(file)} for name, file in SHIPPED[kind]().items()]
    entries = registry.available(kind).values()
    return [{"name": entry.name, "target": entry.target, "package": entry.package} for entry in entries]


def _print_names(names: dict[str, list[dict[str, str]]], as_json: bool) -> None:
    if as_json:
        say(json.dumps(names, indent=1))
        return
    width = max((len(row["name"]) for rows in names.values() for row in rows), default=0) + 2
    for kind, rows in names.items():
        say(f"{kind}:")
        for row in rows:
            say(f"  {row['name']:<{width}}{row['target']}")


def _print_meaning(title: str, text: str, options: list[Option]) -> None:
    say(f"{title}\n\n{text}\n\noptions:{'' if options else ' none'}")
    for option in options:
        default = "  (required)" if option.default is None else f" = {option.default}"
        say(f"  {option.name}: {option.type}{default}")
        if option.meaning:
            say(textwrap.fill(option.meaning, 110, initial_indent="      ", subsequent_indent="      "))
