"""What a user's function says of itself in attributes, all of them optional: `name`, `differentiable`, `range`, …"""

import functools
import re
from typing import Any


def attribute(function: Any, name: str, default: Any) -> Any:
    """An attribute of the function; for a `functools.partial` without it, that of the function inside."""
    while isinstance(function, functools.partial):
        if name in vars(function):
            return vars(function)[name]
        function = function.func
    return getattr(function, name, default)


def name_of(function: Any) -> str:
    """The name of a reward in metrics: its `name` if it has one, else that of the function or class."""
    name = attribute(function, "name", None) or attribute(function, "__name__", type(function).__name__)
    return re.sub(r"[^\w-]", "", str(name)) or "reward"
