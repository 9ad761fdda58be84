"""The options of a block are its constructor's arguments: the signature is the schema. Also readable error messages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from agsm_rl.errors import UserError
from agsm_rl.training.limits import MAX_NUMBER, MAX_SEED

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
_UNION_TAG = re.compile(
    r"^(str|int|float|bool|none|Block|constrained-\w+|\w+-(before|after|wrap)\(.*\)|(dict|list|tuple)\[.*\])$"
)


MEANT = {
    "lr": ("learning_rate", "optimizer.learning_rate"),
    "learning_rate": ("optimizer.learning_rate",),
    "lr_scheduler": ("schedule", "optimizer.schedule"),
    "lr_warmup_steps": ("warmup_steps", "schedule.warmup_steps", "optimizer.schedule.warmup_steps"),
    "warmup_steps": ("schedule.warmup_steps", "optimizer.schedule.warmup_steps"),
    "wd": ("weight_decay", "optimizer.weight_decay"),
}
"""Keys of other programs and their names here, in order of preference, where the spelling is too different to match."""


class Section(BaseModel):
    """Typed keys. Unknown keys are errors that suggest the nearest match; numbers must be finite."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        validate_assignment=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key, value in data.items():
                if key not in cls.model_fields:
                    if cls.model_config.get("extra") != "forbid":
                        continue
                    raise _mistake(unknown_key(str(key), list(cls.model_fields)))
                if isinstance(value, bool) and _takes_number(cls.model_fields[key].annotation):
                    # In Python, True is the number 1.
                    raise _mistake(f"'{key}' is {str(value).lower()}, but it must be a number")
                if isinstance(value, int) and abs(value) > MAX_NUMBER and key != "seed":
                    raise _mistake(f"'{key}' is {value}, but numbers here are at most {MAX_NUMBER:,}")
        return data


class RewardOptions(Section):
    """A reward in a source's `rewards`: its name, how it enters the sum, and its constructor's arguments.

    Args:
        use: Registered name of the reward. Null: the key under which it is listed.
        weight: Factor in the sum. A negative weight lowers the reward; with 0 it is only logged.
        normalise: `raw`: the reward's own unit. `z_score`: standard deviations of this reward.
    """

    model_config = ConfigDict(extra="allow")

    use: str | None = None
    weight: float = 1.0
    normalise: Literal["raw", "z_score"] = "raw"


GivenReward = Annotated[
    Annotated[float, Tag("float")] | Annotated[RewardOptions, Tag("dict[options]")],
    Discriminator(lambda given: "dict[options]" if isinstance(given, Mapping | RewardOptions) else "float"),
]
"""A weight, or a mapping. They are distinguished before validation, so that errors refer to the right one."""


def _takes_number(annotation: Any) -> bool:
    """Whether an annotation allows a number but not a bool."""
    allowed = get_args(annotation) or (annotation,)
    return bool not in allowed and any(kind in allowed for kind in (int, float))


def _mistake(text: str) -> PydanticCustomError:
    return PydanticCustomError("mistake", "{text}", {"text": text})


REQUIRED = {
    "steps": "400",
    "backbone": "{use: stable_diffusion, checkpoint: builtin:shapes-sd15}",
    "adapters": "{lora: {use: lora, rank: 8}}",
    "objectives": "[{use: score_matching, source: {use: pairs, dataset: builtin:shapes, batch_size: 8}}]",
    "recipe": "builtin:agsm",
}
"""What to write for the keys that a recipe or a sweep cannot do without."""


def unknown_key(key: str, allowed: list[str]) -> str:
    """The message for an unknown key."""
    close = [meant for meant in MEANT.get(key, ()) if meant.split(".")[0] in allowed]
    close = close or get_close_matches(key[:100], allowed, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"'{key}' is not an option here; allowed: {', '.join(sorted(allowed)) or 'none'}.{hint}"


def options_model(cls: Any, *, where: str) -> type[Section]:
    """The schema of a class's constructor: one option per argument, with its type and default.

    Two arguments are special: a recipe lists `rewards` by name ({name: weight}, or {name: {use, weight, normalise,
    options…}}), and `seed` may be null, which means the recipe's seed. UserError if a type cannot be resolved.
    """
    try:
        return _options_model(cls)
    except NameError as error:
        raise UserError(
            f"{where}: the constructor of {cls.__module__}:{cls.__qualname__} has an unknown type: {error}"
        ) from error


@cache
def _options_model(cls: Any) -> type[Section]:
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(cls, eval_str=True).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        default = ... if parameter.default is parameter.empty else parameter.default
        if parameter.name == "rewards":
            annotation = Annotated[dict[str, GivenReward], Field(min_length=1)]
        if parameter.name == "seed":
            annotation, default = Seed | None, None
        fields[parameter.name] = (annotation, default)
    model: type[Section] = create_model(f"{cls.__name__}Options", __base__=Section, **fields)
    return model


def validated(cls: Any, given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The options of a class as plain data, with all defaults; a UserError names the first wrong one."""
    try:
        return options_model(cls, where=where).model_validate(dict(given)).model_dump(mode="json")
    except ValidationError as error:
        raise explain(error, where=where) from error


def explain(error: ValidationError, *, where: str) -> UserError:
    """The first of pydantic's errors, as `where.place: got …; it should be …`."""
    first = error.errors(include_url=False)[0]
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not _UNION_TAG.match(part) and part != "[key]":
            place += f".{part}" if place else part
    separator = "" if not place else "." if not where.endswith(": ") else ""
    head = f"{where}{separator}{place}" if place else where.removesuffix(": ")
    example = f" Write e.g. `{place}: {REQUIRED[place]}`." if place in REQUIRED else ""
    if first["type"] == "missing" or (example and first["input"] is None):
        state = "missing" if first["type"] == "missing" else "empty (null)"
        return UserError(f"{head}: this key is required, but it is {state}.{example}")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("mistake", "value_error"):
        return UserError(f"{head}: {message}")
    if first["type"] in ("model_type", "dict_type"):
        message = "it should be a mapping, {key: value}"
    return UserError(f"{head}: got {_short(first['input'])}; {message.replace('Input should', 'it should')}.")


def _short(value: Any) -> str:
    text = (
        {None: "nothing (null)", True: "true", False: "false"}.get(value, "")
        if value is None or isinstance(value, bool)
        else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "…"
