"""The mistakes in a recipe's blocks that show without importing what they name, to be listed with those of its keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from agsm_rl import registry
from agsm_rl.errors import UserError
from agsm_rl.recipe.options import BESIDE, RewardOptions, mistakes_in
from agsm_rl.recipe.schema import SuiteBlock, TermBlock
from agsm_rl.recipe.signatures import model_in_source


def mistakes_in_blocks(data: Mapping[str, Any], where: str) -> list[str]:
    """Unknown names, unknown options and values of a wrong type, in blocks that are mappings at all."""
    return [
        message for kind, place, block, keys in _blocks(data) for message in _mistakes(kind, place, block, keys, where)
    ]


def _blocks(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], set[str]]]:
    """Each block with its kind, its place, and the keys in it that are not its class's options."""
    if isinstance(data.get("backbone"), Mapping):
        yield "backbones", "backbone", data["backbone"], {"use"}
    for kind in ("adapters", "sources"):
        for name, block in _items(data.get(kind)):
            yield from _with_rewards(kind, f"{kind}.{name}", block, {"use"})
    objectives = data.get("objectives")
    for index, term in enumerate(objectives if isinstance(objectives, list) else []):
        if isinstance(term, Mapping):
            yield from _with_rewards("objectives", f"objectives[{index}]", term, {*TermBlock.model_fields})
            for kind, key in (("sources", "source"), ("views", "view")):
                if isinstance(term.get(key), Mapping):
                    yield from _with_rewards(kind, f"objectives[{index}].{key}", term[key], {"use"})
    evaluate = data.get("evaluate")
    if isinstance(evaluate, Mapping):
        yield from _rewards(evaluate.get("rewards"), "evaluate", {"use"})
        for name, block in _items(evaluate.get("suites")):
            place = f"evaluate.suites.{name}"
            yield "suites", place, block, {*SuiteBlock.model_fields}
            yield from _rewards(block.get("rewards"), place, {"use"})


def _with_rewards(
    kind: str, place: str, block: Mapping[str, Any], keys: set[str]
) -> Iterator[tuple[str, str, Mapping[str, Any], set[str]]]:
    yield kind, place, block, keys
    yield from _rewards(block.get("rewards"), place, {*RewardOptions.model_fields})


def _rewards(rewards: Any, place: str, keys: set[str]) -> Iterator[tuple[str, str, Mapping[str, Any], set[str]]]:
    """Rewards by name are blocks too, whose key is their `use` unless they have one."""
    for index, name in enumerate(rewards if isinstance(rewards, list) else ()):
        if isinstance(name, str):
            yield "rewards", f"{place}.rewards[{index}]", {"use": name}, keys
    for name, options in rewards.items() if isinstance(rewards, Mapping) else ():
        given = options if isinstance(options, Mapping) else {}
        yield "rewards", f"{place}.rewards.{name}", {"use": name} | dict(given), keys


def _items(section: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, block in section.items() if isinstance(section, Mapping) else ():
        if isinstance(block, Mapping):
            yield str(name), block


def _mistakes(kind: str, place: str, block: Mapping[str, Any], keys: set[str], where: str) -> list[str]:
    use = block.get("use")
    if not isinstance(use, str) or ":" in use:
        return []
    is_key = kind == "rewards" and place.endswith((f".{use}", "]"))
    named_at = f"{where}: {place}" + ("" if is_key else ".use")
    try:
        entry = registry.entry_of(kind, use, where=named_at)
    except UserError as error:
        return [str(error)]
    model = model_in_source(entry.target)
    if model is None:
        return []
    # A weight in an evaluation has no effect, which `in_evaluation` says.
    others = keys | {*RewardOptions.model_fields} if kind == "rewards" else keys
    options = {key: block[key] for key in block if key not in others}
    if kind == "suites" and "rewards" in model.model_fields:
        options["rewards"] = {"any": 1.0}  # a suite's rewards are a key beside its options
    try:
        model.model_validate(options, context={BESIDE: keys})
    except ValidationError as error:
        return mistakes_in(error, where=f"{where}: {place}")
    return []
