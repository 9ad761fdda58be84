"""The way to the screen: text is shown as it is, controls no terminal, and a lost screen does not end the work.

Prompts, file names and models' answers are other people's text. `plain` spells out control characters, consoles made
here read neither markup nor emoji codes, and within `steady_screen` printing never raises.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 (but tab and line feed), DEL and C1; line separators and the marks that reverse text; halves of characters."""

_SPELLED = {"ψ": "psi", "⁻": "-", "⁺": "+", "→": "->", "–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "≈": "~"}
_SPELLED |= dict.fromkeys("“”„", '"') | dict.fromkeys("‘’", "'") | {"±": "+-", "²": "^2", "·": "."}
_SPELLED |= dict.fromkeys("─━═╸╺╴╶", "-") | dict.fromkeys("│┃║", "|") | dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼╞╡╪", "+")


def plain(text: str) -> str:
    """The text with control characters written as escapes (`\\x1b`), so that it cannot steer a terminal."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(text: str, *, err: bool = False) -> None:
    """Print a line on stdout, or on stderr with `err`."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        print(plain(text), file=stream, flush=True)


class PlainConsole(Console):
    """A rich console for which text is text: no markup, no emoji codes, no highlighting, no control characters.

    On a `terse` one, `tell` prints what is `important` only, and no progress is shown.
    """

    def __init__(self, *, terse: bool = False, **options: Any) -> None:
        super().__init__(**({"markup": False, "emoji": False, "highlight": False} | options))
        self.terse = terse

    @property
    def encoding(self) -> str:
        """That of the stream, which rich asks only where it was given one; without UTF-8 it draws lines in ASCII."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich's, of the plain text."""
        return super().render_str(plain(text), **options)

    def on_broken_pipe(self) -> None:
        """Be silent from now on; rich would end the process, and a training with it."""
        self.quiet = True


def make_console(*, stderr: bool = False, terse: bool | None = None, **options: Any) -> Console:
    """The console that every room prints tables, rules and progress on. options: rich's.

    terse: print warnings and results only (None: on stderr, what `only_what_matters` says).
    """
    return PlainConsole(stderr=stderr, terse=_terse and stderr if terse is None else terse, **options)


_terse = False


@contextmanager
def only_what_matters(quiet: bool = True) -> Iterator[None]:
    """Within the block (`--quiet`), consoles that are made for stderr print warnings and results only."""
    global _terse
    before, _terse = _terse, quiet
    try:
        yield
    finally:
        _terse = before


def is_quiet(console: Console) -> bool:
    """Whether a console shows no progress."""
    return console.quiet or getattr(console, "terse", False)


def tell(console: Console, text: str, *, style: str = "", important: bool = False, prose: bool = False) -> None:
    """Print a line as it is on any console, whatever that makes of markup; long lines are not broken.

    important: a warning or a result, which is printed on a terse console too. prose: a terminal breaks it at spaces, as
    is right for a text in which there is nothing to copy.
    """
    if important or not is_quiet(console):
        console.print(styled(text, style), soft_wrap=not (prose and console.is_terminal))


def styled(text: str, style: str = "") -> Text:
    """Plain text in a style of ours, such as `bold`."""
    return Text(plain(text), style=style)


@contextmanager
def steady_screen() -> Iterator[list[OSError]]:
    """Within the block, nothing that is printed on stdout or stderr raises.

    What an encoding lacks is spelled in ASCII. A stream that cannot be written any more is dropped. Yields a list that
    holds the error afterwards if that was stdout, and not just because its reader has gone (as `head` does).
    """
    _open_closed_descriptors()
    lost: list[OSError] = []
    before = (sys.stdout, sys.stderr)
    settings = [_spell_out(stream) for stream in before]
    out, err = _SteadyStream(before[0], lost), _SteadyStream(before[1], [])
    sys.stdout, sys.stderr = out, err
    try:
        yield lost
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        for stream, errors in zip(before, settings, strict=True):
            if errors is not None:
                stream.reconfigure(errors=errors)  # type: ignore[union-attr]


class _SteadyStream:
    """A text stream whose `write` and `flush` do not raise; everything else is the stream's."""

    def __init__(self, stream: TextIO, lost: list[OSError]) -> None:
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self._stream.write(text.encode("ascii", "agsm_rl.spelled").decode())
        except (OSError, ValueError) as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        """Let what is printed from now on, and what is still buffered, go nowhere."""
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) and not self._lost:
            self._lost.append(error)
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_closed_descriptors() -> None:
    """Give stdin, stdout and stderr that were closed a place, or the next file opened would get what is printed."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _spell_out(stream: TextIO) -> str | None:
    """Have a stream spell what its encoding lacks; its error handler until now, None where it has none to set."""
    if not isinstance(stream, io.TextIOWrapper):
        return None
    errors = stream.errors
    stream.reconfigure(errors="agsm_rl.spelled")
    return errors


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_SPELLED.get(x) or x.encode("unicode_escape").decode() for x in letters), error.end


codecs.register_error("agsm_rl.spelled", _spelled)


def without_loading_bars() -> None:
    """Switch off the progress bars of the libraries that load models: they would stand between our lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
