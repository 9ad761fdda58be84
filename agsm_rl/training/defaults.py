"""What a plug-in's class need not define: the defaults of the base class, filled in when it enters a run."""

from types import MethodType
from typing import Any

from agsm_rl.errors import UserError


def with_defaults(thing: Any, base: type) -> Any:
    """`thing` itself, given what `base` (Source, Reward, …) provides by default where it has no such attribute.

    UserError where it has no room for one.
    """
    set_attribute = type.__setattr__ if isinstance(thing, type) else object.__setattr__  # past a frozen dataclass's own
    for name, value in vars(base).items():
        if name.startswith("_") or hasattr(thing, name):
            continue
        try:
            set_attribute(thing, name, MethodType(value, thing) if callable(value) else value)
        except AttributeError as error:
            raise UserError(
                f"{type(thing).__name__}: it has no `{name}`, and its `__slots__` have no room for it"
            ) from error
    return thing
