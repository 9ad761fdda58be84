"""Writes docs/reference/ from the code: `python docs/make_reference.py`. To change a page, change a docstring.

tests/docs/test_reference.py fails while a page is not what this script writes.
"""

import inspect
import json
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import typer

from agsm_rl import registry
from agsm_rl.cli.commands import app
from agsm_rl.evaluate.suite_options import ARGUMENTS, NAMES, entered
from agsm_rl.interfaces import Batch
from agsm_rl.recipe import schema
from agsm_rl.recipe.meanings import Option, about, in_words, keys_of, options_of
from agsm_rl.recipe.options import RewardOptions, Section
from agsm_rl.training.optimizers import OPTIMIZERS
from agsm_rl.training.schedules import SCHEDULES

FOLDER = Path(__file__).parent / "reference"
MADE = "<!-- Made by docs/make_reference.py from the code; change the docstrings, then run it. -->"
INTRODUCTIONS = {
    "objectives": "What is learned: terms of `objectives:`. In addition to its own options, each takes the [keys of "
    "every term](recipe.md#objectives).",
    "rewards": "Scores of images, by name in the `rewards:` of a source, of an objective or of `evaluate`. In addition "
    "to its own options, each takes the [keys of every reward](recipe.md#rewards). How to choose one, and where the "
    "weights come from: [Rewards](../rewards.md).",
    "adapters": "What is trained: blocks of `adapters:` in a [recipe](recipe.md#adapters).",
    "sources": "Where batches come from: blocks of `sources:` in a [recipe](recipe.md#sources), or a term's own "
    "`source:`.",
    "views": "What one term sees of a batch that several terms share: the `view:` of a [term](recipe.md#objectives).",
    "suites": "What is measured: blocks of `evaluate.suites:` in a [recipe](recipe.md#suites), each with the keys of "
    "every suite, and what `agsm-rl eval --suite` takes. On the command line, an option without a flag of its own is "
    "given as `--option name=value`. How to use them: [Evaluation](../evaluation.md).",
    "backbones": "The frozen base model: the `backbone:` of a [recipe](recipe.md#backbone). Another `checkpoint:` is "
    "another base ([your own](../guides/your-model.md)).",
}
SECTIONS: list[tuple[str, type[Section], str]] = [
    ("The run", schema.RecipeKeys, "The keys at the top."),
    ("backbone", schema.Block, "A block, `{use: name, …}`. Its options: [Backbones](backbones.md)."),
    ("adapters", schema.Block, "Blocks by name, `{name: {use: …}}`. Their options: [Adapters](adapters.md)."),
    ("ema", schema.Ema, ""),
    ("sources", schema.Block, "Blocks by name, `{name: {use: …}}`. Their options: [Sources](sources.md)."),
    (
        "objectives",
        schema.TermBlock,
        "A list of terms. The objective's own options go beside these keys: [Objectives](objectives.md). The blocks of "
        "`view`: [Views](views.md).",
    ),
    (
        "rewards",
        RewardOptions,
        "In a source, an objective or `evaluate`: `{name: weight}`, or `{name: {…}}` with these keys and the reward's "
        "own options: [Rewards](rewards.md).",
    ),
    ("weights", schema.WeightKeys, ""),
    ("gradient_map", schema.GradientMapKeys, ""),
    ("optimizer", schema.Optimizer, ""),
    ("evaluate", schema.Evaluate, ""),
    (
        "suites",
        schema.SuiteBlock,
        "In `evaluate`: suites by name, `{name: {use: …}}`. Their options: [Suites](suites.md).",
    ),
    ("sample", schema.Samples, ""),
    ("checkpoint", schema.CheckpointKeys, ""),
    ("stop_when", schema.StopRule, "Rules by score: `{overall: {falls_by: 0.05}}`."),
    ("watch", schema.WatchKeys, ""),
]
"""Title, keys, and what is said of them where the docstring is for readers of the code."""


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    kinds = {f"{kind}.md": kind_page(kind) for kind in registry.KINDS}
    return {"recipe.md": recipe_page(), **kinds, "command_line.md": command_page()}


def recipe_page() -> str:
    """Every key of a recipe."""
    parts = [
        "# Recipe",
        "Every key of a recipe, with its type, its default and its meaning. Any other key is an error, unless it is an "
        "option of what its block uses. `agsm-rl check RECIPE` validates without running; `--set key.path=value` "
        "changes a value on the command line.",
    ]
    for title, section, note in SECTIONS:
        parts += [f"## {title}", note or about(section), table(keys_of(section))]
        if section is schema.Optimizer:
            parts += named_parts("optimizer", OPTIMIZERS) + named_parts("optimizer.schedule", SCHEDULES)
    return joined(parts)


def named_parts(place: str, kinds: Mapping[str, Any]) -> list[str]:
    """The own options of each optimizer or schedule."""
    parts = []
    for name, found in kinds.items():
        text = [linked(" ".join(paragraph.split())) for paragraph in about(found).split("\n\n")]
        parts += [f"### {place}: {name}", *text, table(options_of(found, where=name))]
    return parts


def kind_page(kind: str) -> str:
    """All registered names of a kind with their options."""
    parts = [f"# {kind.capitalize()}", INTRODUCTIONS[kind]]
    for name, target in sorted(registry.BUILTIN[kind].items()):
        found = registry.load(kind, name, where=kind)
        module = inspect.cleandoc(sys.modules[target.partition(":")[0]].__doc__ or "")
        parts += [f"## {name}", *introduction(kind, found, module), *facts(kind, name, found)]
        parts.append(table(options_of(found, where=name)))
    return joined(parts)


def introduction(kind: str, found: Any, module: str) -> list[str]:
    """What the module and the class say: views, and functions, do not have a module of their own."""
    first = module.partition("\n\n")[0]
    own_module = kind != "views" and inspect.isclass(found)
    return [linked(" ".join(text.split())) for text in ([first] if own_module else []) + about(found).split("\n\n")]


def facts(kind: str, name: str, found: Any) -> list[str]:
    """What the class declares beside its options."""
    if kind == "objectives":
        page = f"Equation, settings, cost, metrics and pitfalls: [{name}](../objectives/{name}.md)."
        return [f"Learns from: {givers(found.consumes)}.", page]
    if kind == "rewards":
        gradient = "with gradients to the pixels" if found.differentiable else "no gradients"
        low, high = getattr(found, "range", (None, None))
        size = "" if low is None else f"Range {number(low)} to {number(high)}; "
        licence = f"; licence: {found.licence}" if hasattr(found, "licence") else ""
        return [f"{size}{gradient}{licence}."]
    if kind == "suites":
        flags = [name for name in NAMES if ARGUMENTS.get(name, name) in inspect.signature(found).parameters]
        return [f"On the command line: {', '.join(f'`{entered(flag)}`' for flag in flags)}."] if flags else []
    if kind == "views":
        return [f"Looks at: {givers(found.consumes)}."]
    return []


def givers(wanted: type[Batch]) -> str:
    """The sources and views that give a batch, in words."""
    names = {
        kind: [
            f"[{name}]({kind}.md#{name})"
            for name in sorted(registry.BUILTIN[kind])
            if issubclass(registry.load(kind, name, where=kind).gives, wanted)
        ]
        for kind in ("sources", "views")
    }
    views = f"; through a view: {', '.join(names['views'])}" if names["views"] else ""
    return f"{', '.join(names['sources'])}{views}"


def command_page() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Command line",
        "Every command and option; `agsm-rl COMMAND --help` prints the same. A mistake in what you gave ends with exit "
        "code 2 and one message. Examples: [The command line](../cli.md).",
    ]
    for name, command in commands().items():
        arguments = [one.metavar or one.name.upper() for one in command.params if one.param_type_name == "argument"]
        usage = " ".join(["agsm-rl", name, *arguments, "[OPTIONS]"])
        parts += [f"## {name}", linked(" ".join(command.help.split())), f"```text\n{usage}\n```"]
        parts.append(table(options_of_command(command).values()))
    return joined(parts)


def commands() -> dict[str, Any]:
    """The commands by name."""
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_of_command(command: Any) -> dict[str, Option]:
    """The arguments and options of a command, by their names in the code."""
    types = typing.get_type_hints(command.callback)
    return {
        one.name: option_of(one, types)
        for one in command.params
        if one.name not in ("help", "install_completion", "show_completion")
    }


def option_of(parameter: Any, types: dict[str, Any]) -> Option:
    """A parameter of a command as a row of the table."""
    name = ", ".join(parameter.opts)
    if parameter.param_type_name == "argument":
        name = (parameter.metavar or parameter.name.upper()).strip("[]")
    kind = in_words(types[parameter.name]).removesuffix(" or null")
    default = "" if parameter.default is None else json.dumps(parameter.default, default=str)
    default = None if parameter.required else default
    return Option(name, parameter.metavar or kind, default, parameter.help or "")


def table(options: Iterable[Option]) -> str:
    """The options, a row each; a line that says so where there are none."""
    rows = []
    for option in options:
        default = "required" if option.default is None else f"`{option.default}`" if option.default else "–"
        name = option.name.replace("|", " or ")
        rows.append(f"| `{name}` | {cell(option.type)} | {default} | {cell(linked(option.meaning))} |")
    if not rows:
        return "No options."
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *rows])


def cell(text: str) -> str:
    """Text that is safe between two `|`."""
    return text.replace("|", "\\|")


def linked(text: str) -> str:
    """arXiv numbers and pages of docs/ as links; <name> is no HTML."""
    text = "`".join(part if code else part.replace("<", "&lt;") for code, part in zip(cycle((0, 1)), text.split("`")))
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"\bdocs/([\w/]+)\.md", lambda page: f"[{page[1]}](../{page[1]}.md)", text)


def number(value: float) -> str:
    """A bound of a range."""
    return {float("inf"): "∞", -float("inf"): "−∞"}.get(value, f"{value:g}".replace("-", "−"))


def joined(parts: list[str]) -> str:
    """Paragraphs as a page."""
    return "\n\n".join([MADE, *parts]) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file_name, content in pages().items():
        (FOLDER / file_name).write_text(content, encoding="utf-8")
