"""What several commands take and do: options under one name and help, and quiet libraries."""

from typing import Annotated, Literal

import typer

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
GuidanceOption = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")]
BankOption = Annotated[
    Literal["positive", "negative"], typer.Option(help="negative: draw with ψ⁻, the paper's ablation.")
]
StepsOption = Annotated[int | None, typer.Option("--num-steps", min=1, help="Sampling steps.")]


def without_loading_bars() -> None:
    """For commands that load models: the libraries' bars would stand between our lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
