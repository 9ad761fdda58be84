"""The command line's program: its commands, what is set before any of them, and `--version`.

Heavy imports are inside the commands, so that `agsm-rl list` and a misspelt key are answered at once.
"""

from __future__ import annotations

import os
import platform
from typing import Annotated

import typer

from agsm_rl import __version__
from agsm_rl.cli.edit import edit
from agsm_rl.cli.eval import evaluate
from agsm_rl.cli.files import convert, world
from agsm_rl.cli.guard import GuardedCommands
from agsm_rl.cli.init import init
from agsm_rl.cli.list import list_names
from agsm_rl.cli.options import in_home
from agsm_rl.cli.results import report
from agsm_rl.cli.sample import sample
from agsm_rl.cli.schema import schema
from agsm_rl.cli.serve_reward import serve_reward
from agsm_rl.cli.share import card, push
from agsm_rl.cli.training import check, doctor, sweep, train
from agsm_rl.run.screen import say
from agsm_rl.threads import follow_free_cores

COMMANDS = {
    "init": init,
    "train": train,
    "check": check,
    "doctor": doctor,
    "sample": sample,
    "edit": edit,
    "eval": evaluate,
    "report": report,
    "sweep": sweep,
    "list": list_names,
    "schema": schema,
    "world": world,
    "convert": convert,
    "card": card,
    "push": push,
    "serve-reward": serve_reward,
}

app = typer.Typer(
    cls=GuardedCommands,
    help="Post-train text-to-image diffusion models with objectives that compose.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name=name, context_settings={"help_option_names": ["-h", "--help"]})(in_home(command))


def _print_versions(asked: bool) -> None:
    """Print our version, then what else a bug report needs. Nothing is imported for it."""
    if not asked:
        return
    from importlib.metadata import version

    say(f"agsm-rl {__version__}")
    say(f"python {platform.python_version()} ({platform.system()} {platform.machine()})")
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate"):
        say(f"{package} {version(package)}")
    raise typer.Exit


@app.callback()
def _before_all(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    follow_free_cores()
    for variable in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(variable, "1")
