"""The schema of what is registered, read from its source: nothing is imported, so that mistakes are answered at once.

Where its source does not say, `validated` imports the class.
"""

from __future__ import annotations

from functools import cache

from agsm_rl.recipe.options import Section, model_of_arguments
from agsm_rl.source_code import arguments_in_source


@cache
def model_in_source(target: str) -> type[Section] | None:
    """The schema of the constructor at `module:Class`; None where its source does not say."""
    arguments = arguments_in_source(target)
    return None if arguments is None else model_of_arguments(target.partition(":")[2], arguments)
