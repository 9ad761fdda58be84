"""`agsm-rl list`: the names that recipes may use, the options of one of them, and the keys of a recipe's blocks."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any

import typer

from agsm_rl import registry
from agsm_rl.errors import unknown_name
from agsm_rl.recipe import schema
from agsm_rl.recipe.meanings import Option, about, keys_of, options_of
from agsm_rl.recipe.options import RewardOptions, Section
from agsm_rl.recipe.shipped import PREFIX, header_of, shipped_recipes, shipped_sweeps
from agsm_rl.run.screen import say
from agsm_rl.source_code import first_sentence, summary_of

SHIPPED = {"recipes": shipped_recipes, "sweeps": shipped_sweeps}
RECIPE = "recipe"
BLOCKS: dict[str, type[Section]] = {
    RECIPE: schema.RecipeKeys,
    "block": schema.Block,
    "term": schema.TermBlock,
    "reward": RewardOptions,
    "ema": schema.Ema,
    "optimizer": schema.Optimizer,
    "evaluate": schema.Evaluate,
    "suite": schema.SuiteBlock,
    "sample": schema.Samples,
    "checkpoint": schema.CheckpointKeys,
    "stop_when": schema.StopRule,
    "watch": schema.WatchKeys,
}
"""The blocks of a recipe whose keys are explained: `term` is one of `objectives`, `reward` one in `rewards`."""
LINE = 110
"""Characters of a line of the list."""


def list_names(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND|NAME]",
            help="objectives, rewards, adapters, sources, views, backbones, suites, recipes or sweeps; a name of "
            "theirs, for its options; or a block of the recipe (recipe, term, optimizer, evaluate, …), for its keys.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What recipes may use, the options of each, the keys of a recipe, and the recipes that are shipped."""
    kinds = [*registry.KINDS, *SHIPPED]
    if what in BLOCKS:
        _print_block(what, as_json)
        return
    if what is None or what in kinds:
        _print_names({kind: _names_of(kind) for kind in ([what] if what else [RECIPE, *kinds])}, as_json)
        return
    homes = [kind for kind in registry.KINDS if what in registry.available(kind)]
    if not homes:
        names = [name for kind in registry.KINDS for name in registry.available(kind)]
        raise unknown_name("list", what, "a kind, a registered name or a block", [*kinds, *names, *BLOCKS])
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
    if kind == RECIPE:
        return [{"name": key.name, "about": first_sentence(key.meaning)} for key in keys_of(schema.RecipeKeys)]
    if kind in SHIPPED:
        shipped = SHIPPED[kind]().items()
        headers = [(name, file, header_of(file)) for name, file in shipped]
        return [
            {
                "name": PREFIX + name,
                "target": str(file),
                "about": header.title,
                "hardware": header.hardware,
                "time": header.time,
                "result": header.result,
            }
            for name, file, header in headers
        ]
    return [
        {"name": entry.name, "target": entry.target, "package": entry.package, "about": summary_of(entry.target)}
        for entry in registry.available(kind).values()
    ]


def _print_names(names: dict[str, list[dict[str, str]]], as_json: bool) -> None:
    if as_json:
        say(json.dumps(names, indent=1))
        return
    for kind, rows in names.items():
        if kind == "recipes":
            say("what each recipe and sweep shows and costs, in a table: docs/recipes.md, or --json")
        width = max((len(row["name"]) for row in rows), default=0) + 2
        say(f"{kind}:")
        for row in rows:
            about = row["about"] or row.get("target", "")
            if row.get("package", registry.HOME) != registry.HOME:
                about = f"[{row['package']}] {about}"
            say(f"  {row['name']:<{width}}{textwrap.shorten(about, LINE - width, placeholder=' …')}")
    if len(names) > 1:
        say(
            "\nagsm-rl list NAME explains one of them; agsm-rl list term, optimizer, evaluate, … a block of the recipe."
        )


def _print_block(name: str, as_json: bool) -> None:
    section = BLOCKS[name]
    if as_json:
        keys = [key.to_json() for key in keys_of(section)]
        say(json.dumps({name: {"name": name, "about": about(section), "options": keys}}, indent=1))
        return
    _print_meaning(name, about(section), keys_of(section), "keys")


def _print_meaning(title: str, text: str, options: list[Option], called: str = "options") -> None:
    say(f"{title}\n\n{text}\n\n{called}:{'' if options else ' none'}")
    for option in options:
        default = "  (required)" if option.default is None else f" = {option.default}"
        say(f"  {option.name}: {option.type}{default}")
        if option.meaning:
            say(textwrap.fill(option.meaning, 110, initial_indent="      ", subsequent_indent="      "))
