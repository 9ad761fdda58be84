"""The one exception for the user's mistakes: the command line prints it and ends with exit code 2."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

MAX_MESSAGE = 1200
"""Characters of a message; what is longer quotes somebody's file."""
MAX_MISTAKES = 30
"""Mistakes that are listed; a file with more of them is of another kind."""


class UserError(Exception):
    """A mistake that the user can fix.

    The message says where, what was got, what is allowed, and what to do, e.g.
    `recipe.yaml: objectives[1].use: 'dppo' is not an objective; allowed: agsm, ddpo. Did you mean 'ddpo'?`
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shortened(message))


def _shortened(message: str) -> str:
    half = MAX_MESSAGE // 2
    return message if len(message) <= MAX_MESSAGE else f"{message[:half]} … {message[-half:]}"


def unknown_name(where: str, got: str, what: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not one of the `allowed` ones, with the nearest match."""
    names = sorted(allowed)
    close = get_close_matches(got[:100], names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return UserError(f"{where}: '{got}' is not {what}; allowed: {', '.join(names)}.{hint}")


class Mistakes(UserError):
    """Several mistakes in one file, each with its place: one message with a line for each."""

    def __init__(self, where: str, messages: Sequence[str]) -> None:
        prefix = f"{where}: "
        messages = [_shortened(message) for message in messages]
        lines = [f"- {message.removeprefix(prefix)}" for message in messages[:MAX_MISTAKES]]
        more = len(messages) - len(lines)
        lines += [f"- and {more} more"] if more else []
        self.messages = tuple(messages)
        Exception.__init__(self, "\n".join([f"{where}: {len(messages)} mistakes:", *lines]))


def messages_of(error: UserError) -> list[str]:
    """The messages of an error, which may hold several."""
    return list(error.messages) if isinstance(error, Mistakes) else [str(error)]


def combined(where: str, messages: Iterable[str]) -> UserError:
    """The error for one or more mistakes in a file; the same message is listed once."""
    distinct = list(dict.fromkeys(messages))
    return UserError(distinct[0]) if len(distinct) == 1 else Mistakes(where, distinct)


class MistakesSoFar:
    """Collects mistakes, so that a file's are all reported at once. `where` is the file."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.messages: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within the block, a UserError ends the block only, and is kept."""
        try:
            yield
        except UserError as error:
            self.messages += messages_of(error)

    def raise_any(self) -> None:
        """UserError if there were mistakes."""
        if self.messages:
            raise combined(self.where, self.messages)
