"""What an error becomes: one message and exit code 2 where the program was given something that it cannot use.

Anything else is a bug, ours or a plug-in's. It keeps its traceback, asks to be reported, and ends with exit code 1.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Any, cast

import typer
from typer.core import TyperGroup

from agsm_rl.cli import launcher
from agsm_rl.cli.library_warnings import shown_on_one_line
from agsm_rl.errors import UserError
from agsm_rl.run.screen import plain, say, steady_screen

TRACEBACK = "AGSM_RL_TRACEBACK"
"""Set this variable to see the traceback of an error that ends in a message."""
BUG = (
    "agsm-rl: this error is unexpected: a bug in agsm-rl, or in code that it was told to run. Please report it with "
    "the lines above and the output of `agsm-rl --version`: https://github.com/agsm-rl/agsm-rl/issues"
)
LOWER = {
    "train": "the batch_size of a source, or what goes through the model at once (sample_batch_size, groups_per_pass "
    "and the other *_per_pass options); `agsm-rl check RECIPE --fit-vram GB` proposes settings that fit",
    "sample": "--batch-size, the number of images that are drawn at a time, or --resolution",
    "edit": "--resolution, or edit in --dtype bfloat16",
    "eval": "--batch-size, --num-images or --resolution, or draw in --dtype bfloat16",
    "report": "the number of runs in one report",
    "world": "--num-images",
    "serve-reward": "--max-megabytes",
}
LOWER |= dict.fromkeys(("check", "doctor", "sweep"), LOWER["train"])
"""By command: what needs less memory when it is lowered."""

ClickException = cast(type[Exception], typer.BadParameter.__mro__[2])
"""The base of typer's own errors, whose module differs between its versions."""
PARSERS = ("json", "yaml", "pydantic", "copy", "jinja2")
"""Where a RecursionError comes from data that are nested too deeply, not from a bug."""


class GuardedCommands(TyperGroup):
    """Commands whose errors are reported here, and whose output cannot raise any."""

    given: list[str] = []
    """The command line."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run a command and exit."""
        code: Any = 0
        given = arguments[0] if arguments else options.get("args")
        self.given = [str(part) for part in (sys.argv[1:] if given is None else given)]
        with steady_screen() as lost, shown_on_one_line():
            try:
                super().main(*arguments, **options)
            except SystemExit as end:
                code = end.code
            except Exception as error:
                code = report(error)
        if lost and not code:
            say(f"agsm-rl: the output could not be written ({lost[0].strerror}).", err=True)
            code = 2
        sys.exit(code)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the arguments."""
        try:
            return super().make_context(*arguments, **options)
        except ClickException as error:
            raise _plain(error) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except ClickException as error:
            raise _plain(_with_key(error, self.given)) from error
        except KeyboardInterrupt as error:
            say("agsm-rl: interrupted", err=True)
            raise typer.Exit(130) from error
        except Exception as error:
            raise typer.Exit(report(error, ctx.invoked_subcommand)) from error


def report(error: Exception, command: str | None = None) -> int:
    """Print what became of a command that failed; its exit code."""
    from agsm_rl.run.stop import Ended

    if isinstance(error, Ended):
        if error.prints:
            say(f"agsm-rl: {error}", err=True)
        return error.exit_code
    message = explain(error, command)
    if message is None or os.environ.get(TRACEBACK):
        say("".join(traceback.format_exception(error)).rstrip(), err=True)
    if message is None:
        say(BUG, err=True)
        return 1
    launcher.let_the_first_speak()
    say(f"agsm-rl: {message}", err=True)
    return 2


def explain(error: Exception, command: str | None = None) -> str | None:
    """The message for an error that comes from outside the program; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        lower = LOWER.get(command or "")
        return f"the memory is not enough ({_first_line(error)})." + (f" Lower {lower}." if lower else "")
    if isinstance(error, OSError):
        return _of_a_file(error)
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written in its encoding ({error}). Set {TRACEBACK}=1 to see where."
    if isinstance(error, RecursionError) and _is_in(error, PARSERS):
        return f"some of the data are nested too deeply ({error}). Set {TRACEBACK}=1 to see where."
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine has no memory left, in any of the ways in which libraries say so."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _of_a_file(error: OSError) -> str:
    """The file and what is wrong with it, as far as the error says."""
    if error.filename is None:
        return _first_line(error)
    reason = error.strerror or _first_line(error)
    full = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{os.fsdecode(error.filename)}: cannot be read or written ({reason}){full}."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_in(error: Exception, packages: tuple[str, ...]) -> bool:
    """Whether an error was raised in one of these packages' files."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(name in Path(frames[-1].filename).parts for name in packages)


def _with_key(error: Any, given: list[str]) -> Any:
    """For an option that is unknown, but a key of the recipe: how to set it."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if not option or context is None or not any(parameter.name == "overrides" for parameter in context.command.params):
        return error
    from agsm_rl.recipe.options import MEANT
    from agsm_rl.recipe.schema import RecipeKeys

    name = option.lstrip("-").replace("-", "_")
    key = name if name in RecipeKeys.model_fields else next(iter(MEANT.get(name, ())[-1:]), None)
    if key is not None:
        error.message += f" It is a key of the recipe: write --set {key}={_value_of(option, given)}"
        error.possibilities = []
    return error


def _value_of(option: str, given: list[str]) -> str:
    """The value that the command line gives an option."""
    for index, part in enumerate(given):
        if part.startswith(f"{option}="):
            return part.partition("=")[2]
        if part == option and index + 1 < len(given) and not given[index + 1].startswith("-"):
            return given[index + 1]
    return "VALUE"


def _plain(error: Any) -> Any:
    """The same error of the command line, which quotes it, without control characters."""
    error.message = plain(error.message)
    return error
