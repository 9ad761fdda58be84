"""The one exception for mistakes of the user's: the command line prints it and ends with exit code 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can mend.

    The message says where, what was got, what is allowed, and what to do, e.g.
    `recipe.yaml: objectives[1].use: 'dppo' is not an objective; allowed: agsm, ddpo. Did you mean 'ddpo'?`
    """


def unknown_name(where: str, got: str, what: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is none of the `allowed` ones, with the nearest match."""
    names = sorted(allowed)
    close = get_close_matches(got, names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return UserError(f"{where}: '{got}' is not {what}; allowed: {', '.join(names)}.{hint}")
