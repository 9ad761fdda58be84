"""The options of a block are its constructor's arguments: the signature is the schema. Also readable error messages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from agsm_rl.errors import UserError, combined
from agsm_rl.training.limits import MAX_IMAGES, MAX_NUMBER, MAX_SEED

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
NumImages = Annotated[int, Field(ge=1, le=MAX_IMAGES)]
_UNION_TAG = re.compile(
    r"^(str|int|float|bool|none|Block|constrained-\w+|\w+-(before|after|wrap)\(.*\)|(dict|list|tuple)\[.*\])$"
)

BESIDE = "beside"
"""In pydantic's context: keys that belong to the same block in a recipe, and are checked elsewhere."""
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

    @model_validator(mode="wrap")
    @classmethod
    def _only_known_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Check the keys, then the values of those that are right, so that all mistakes are reported together."""
        if not isinstance(data, Mapping):
            return handler(data)
        known = [*cls.model_fields, *(info.context or {}).get(BESIDE, ())]
        mistakes = {key: text for key, value in data.items() if (text := cls._mistake_of(key, value, known))}
        if not mistakes:
            return handler(data)
        meant = {*mistakes, *(name for key in mistakes for name in _close(str(key), known))}
        lines = [InitErrorDetails(type=_mistake(text), loc=(), input=data[key]) for key, text in mistakes.items()]
        try:
            handler({key: value for key, value in data.items() if key not in mistakes})
        except ValidationError as error:
            others = error.errors(include_url=False)
            lines += [_again(line) for line in others if line["type"] != "missing" or line["loc"][0] not in meant]
        raise ValidationError.from_exception_data(cls.__name__, lines)

    @classmethod
    def _mistake_of(cls, key: Any, value: Any, known: list[str]) -> str | None:
        """What is wrong with a key, or with a number that pydantic would take."""
        if key not in cls.model_fields:
            allows_more = cls.model_config.get("extra") != "forbid"
            return None if allows_more else unknown_key(str(key), known)
        if isinstance(value, bool) and _takes_number(cls.model_fields[key].annotation):
            # In Python, True is the number 1.
            return f"'{key}' is {str(value).lower()}, but it must be a number"
        if isinstance(value, int) and abs(value) > MAX_NUMBER and key != "seed":
            return f"'{key}' is {value}, but numbers here are at most {MAX_NUMBER:,}"
        return None


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


def _again(line: ErrorDetails) -> InitErrorDetails:
    """An error that pydantic reported, to be reported with others."""
    kind = _mistake(line["ctx"]["text"]) if line["type"] == "mistake" else line["type"]
    return InitErrorDetails(type=kind, loc=line["loc"], input=line["input"], ctx=line.get("ctx", {}))


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
    close = _close(key, allowed)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"'{key}' is not an option here; allowed: {', '.join(sorted(allowed)) or 'none'}.{hint}"


def _close(key: str, allowed: list[str]) -> list[str]:
    close = [meant for meant in MEANT.get(key, ()) if meant.split(".")[0] in allowed]
    return close or get_close_matches(key[:100], allowed, n=1)


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
    arguments = {}
    for parameter in inspect.signature(cls, eval_str=True).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        default = ... if parameter.default is parameter.empty else parameter.default
        arguments[parameter.name] = (annotation, default)
    return model_of_arguments(cls.__name__, arguments)


def model_of_arguments(name: str, arguments: Mapping[str, tuple[Any, Any]]) -> type[Section]:
    """The schema of a constructor's arguments, {name: (type, default)}; the default `...` means there is none."""
    fields: dict[str, Any] = dict(arguments)
    if "rewards" in fields:
        fields["rewards"] = (Annotated[dict[str, GivenReward], Field(min_length=1)], fields["rewards"][1])
    if "seed" in fields:
        fields["seed"] = (Seed | None, None)
    model: type[Section] = create_model(f"{name}Options", __base__=Section, **fields)
    return model


def validated(cls: Any, given: Mapping[str, Any], *, where: str, beside: Iterable[str] = ()) -> dict[str, Any]:
    """The options of a class as plain data, with all defaults; a UserError names those that are wrong.

    beside: other keys of the same block, for messages.
    """
    model, context = options_model(cls, where=where), {BESIDE: beside}
    try:
        return model.model_validate(dict(given), context=context).model_dump(mode="json")
    except ValidationError as error:
        raise explain(error, where=where) from error


def explain(error: ValidationError, *, where: str) -> UserError:
    """Pydantic's errors, each as `where.place: got …; it should be …`."""
    return combined(where.partition(": ")[0], mistakes_in(error, where=where))


def mistakes_in(error: ValidationError, *, where: str) -> list[str]:
    """The message for each of pydantic's errors. Of the alternatives of a value, the first's is kept."""
    messages: list[str] = []
    wrong: list[str] = []
    for line in error.errors(include_url=False):
        place = _place(line["loc"])
        if any(place == known or place.startswith((f"{known}.", f"{known}[")) for known in wrong):
            continue
        if line["type"] != "mistake" and place:
            wrong.append(place)
        messages.append(_message(line, place, where))
    return messages


def _place(loc: tuple[int | str, ...]) -> str:
    """A place as it is written in Python, `objectives[0].source`."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not _UNION_TAG.match(part) and part != "[key]":
            place += f".{part}" if place else part
    return place


def _message(line: ErrorDetails, place: str, where: str) -> str:
    separator = "" if not place else "." if not where.endswith(": ") else ""
    head = f"{where}{separator}{place}" if place else where.removesuffix(": ")
    example = f" Write e.g. `{place}: {REQUIRED[place]}`." if place in REQUIRED else ""
    if line["type"] == "missing" or (example and line["input"] is None):
        state = "missing" if line["type"] == "missing" else "empty (null)"
        return f"{head}: this key is required, but it is {state}.{example}"
    message = line["msg"].removeprefix("Value error, ")
    if line["type"] in ("mistake", "value_error"):
        return f"{head}: {message}"
    if line["type"] in ("model_type", "dict_type"):
        message = "it should be a mapping, {key: value}"
    return f"{head}: got {_short(line['input'])}; {message.replace('Input should', 'it should')}."


def _short(value: Any) -> str:
    text = (
        {None: "nothing (null)", True: "true", False: "false"}.get(value, "")
        if value is None or isinstance(value, bool)
        else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "…"
