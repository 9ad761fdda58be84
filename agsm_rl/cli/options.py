"""Options that several commands share, under one name and help; and options in groups, as dataclasses."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from agsm_rl.errors import UserError
from agsm_rl.files import local_path
from agsm_rl.registry import permissions
from agsm_rl.training.limits import MAX_SAMPLING_STEPS

PATH_NAMES = (
    *("recipe", "target", "base", "sweep_file", "against", "prompts", "images", "checkpoint"),
    *("detector", "classifier"),
)
"""Parameters that are texts because they may also name a builtin or a repository on the hub."""


def grouped(command: Callable[..., None]) -> Any:
    """Let a command take its options as dataclasses: typer sees their fields, the command gets the objects.

    A field is declared as typer declares a parameter, `name: Annotated[type, typer.Option(...)] = default`. The class's
    docstring is the heading under which `--help` lists its fields.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind
            parameters += _parameters_of(kind)
        else:
            parameters.append(parameter.replace(annotation=kind, kind=parameter.KEYWORD_ONLY))

    @wraps(command)
    def called(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _parameters_of(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=_under(kind.__doc__.partition(".")[0], hints[field.name]),
        )
        for field in fields(kind)
    ]


def in_home(command: Callable[..., None]) -> Any:
    """Let `~` be the home folder in a command's paths, also where the shell leaves it (`--run-dir=~/x`)."""

    def expanded(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(name, item) for item in value]
        if isinstance(value, Path):
            return local_path(value)
        is_path = isinstance(value, str) and value.startswith("~") and name in PATH_NAMES
        return str(local_path(value)) if is_path else value

    @wraps(command)
    def called(**values: Any) -> None:
        command(**{name: expanded(name, value) for name, value in values.items()})

    return called


def _under(heading: str, annotation: Any) -> Any:
    """The same option, listed under a heading of its own."""
    kind, option = get_args(annotation)
    option = copy(option)
    option.rich_help_panel = heading
    return Annotated[kind, option]


def finite(param: typer.CallbackParam, value: float | None) -> float | None:
    """The value of an option; UserError if it is infinite or not a number."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"--{str(param.name).replace('_', '-')}: got {value}; it should be a finite number.")
    return value


TrainedArgument = Annotated[
    str, typer.Argument(metavar="RECIPE|RUN", help="A recipe's YAML file, builtin:<name>, or a run's folder to resume.")
]
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or builtin:<name>.")]
TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run folder, an exported adapter, or a base (builtin:…, a folder).")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value, e.g. steps=10. Repeatable.")
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow-import", metavar="MODULE", help="Let the recipe use code from this module. Repeatable."),
]
BaseOption = Annotated[str | None, typer.Option(help="The base to use an adapter on, instead of the one it names.")]
GuidanceOption = Annotated[float | None, typer.Option(callback=finite, help="Classifier-free guidance; 1 is off.")]
BankOption = Annotated[
    Literal["positive", "negative"],
    typer.Option(
        help="negative: both branches of guidance use the negative bank, the AGSM paper's ablation. For the "
        "unconditional branch alone: --guidance-bank."
    ),
]
GuidanceBankOption = Annotated[
    Literal["positive", "negative"] | None,
    typer.Option(
        help="Bank of guidance's unconditional branch; the conditional one's is positive. Default: the adapter's."
    ),
]
GuidancePromptOption = Annotated[
    Literal["empty", "same"] | None,
    typer.Option(
        help="Prompt of guidance's unconditional branch; same needs the negative bank. Default: the adapter's."
    ),
]
ResolutionOption = Annotated[
    str | None,
    typer.Option(
        "--resolution",
        metavar="SIDE|HEIGHT,WIDTH",
        help="Pixels per side, or height and width: 768,1344.",
    ),
]
StepsOption = Annotated[int | None, typer.Option("--num-steps", min=1, max=MAX_SAMPLING_STEPS, help="Sampling steps.")]


def resolution_of(text: str | None) -> int | tuple[int, int] | None:
    """The value of --resolution; UserError where it is not a size."""
    from agsm_rl.training.sizes import parse_resolution

    return None if text is None else parse_resolution(text, where="--resolution")


@dataclass(frozen=True)
class Permissions:
    """What the recipe may do beyond using registered code."""

    allow_import: AllowOption = None
    allow_command: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-command", metavar="COMMAND", help="Let the recipe run this script or command. Repeatable."
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="HOST", help="Let the recipe's rewards send images there. Repeatable."),
    ] = None
    allow_env: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-env",
            metavar="NAME",
            help="Let the recipe's rewards send this environment variable, a key, to their server. Repeatable.",
        ),
    ] = None

    def granted(self) -> frozenset[str]:
        """As the `allow_imports` of all functions; UserError for something that is not a module."""
        return permissions(
            imports=self.allow_import,
            commands=self.allow_command,
            hosts=self.allow_host,
            variables=self.allow_env,
        )
