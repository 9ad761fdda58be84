"""What several commands take and do: options under one name and help, and quiet libraries."""

import math
from typing import Annotated, Literal

import typer

from agsm_rl.errors import UserError
from agsm_rl.training.limits import MAX_SAMPLING_STEPS

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or builtin:<name>.")]
TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run folder, an exported adapter, or a base (builtin:…, a folder).")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value, e.g. steps=10. Repeatable.")
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow-import", metavar="MODULE", help="Let the recipe use code of this module. Repeatable."),
]
CommandOption = Annotated[
    list[str] | None,
    typer.Option("--allow-command", metavar="COMMAND", help="Let the recipe run this script or command. Repeatable."),
]
HostOption = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="HOST", help="Let the recipe's rewards send pictures there. Repeatable."),
]
BaseOption = Annotated[str | None, typer.Option(help="The base of an adapter, instead of the one that it names.")]


def _finite(guidance: float | None) -> float | None:
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance: got {guidance}; a finite number is wanted.")
    return guidance


GuidanceOption = Annotated[float | None, typer.Option(callback=_finite, help="Classifier-free guidance; 1 is off.")]
BankOption = Annotated[
    Literal["positive", "negative"], typer.Option(help="negative: draw with ψ⁻, the paper's ablation.")
]
StepsOption = Annotated[int | None, typer.Option("--num-steps", min=1, max=MAX_SAMPLING_STEPS, help="Sampling steps.")]
