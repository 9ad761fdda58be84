"""The one exception for the user's mistakes: the command line prints it and ends with exit code 2."""

from collections.abc import Iterable
from difflib import get_close_matches

MAX_MESSAGE = 1200
"""Characters of a message; what is longer quotes somebody's file."""


class UserError(Exception):
    """A mistake that the user can fix.

    The message says where, what was got, what is allowed, and what to do, e.g.
    `recipe.yaml: objectives[1].use: 'dppo' is not an objective; allowed: agsm, ddpo. Did you mean 'ddpo'?`
    """

    def __init__(self, message: str) -> None:
        half = MAX_MESSAGE // 2
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:half]} … {message[-half:]}")


def unknown_name(where: str, got: str, what: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not one of the `allowed` ones, with the nearest match."""
    names = sorted(allowed)
    close = get_close_matches(got[:100], names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return UserError(f"{where}: '{got}' is not {what}; allowed: {', '.join(names)}.{hint}")
