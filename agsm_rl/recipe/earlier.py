"""What a stored recipe means today, so that runs, sweeps and measurements of earlier versions are recognised.

A recipe is stored with every default written out, but lacks the options that came in later. Each option therefore has
a *first default*, in first_defaults.yaml: the value with which everything is as it was before the option existed. A
stored recipe is completed by the first defaults of what it lacks, and is the same as a recipe of today if the two are
then equal. So a new option changes nothing for what was made before, unless it is set. A default that is changed later
does change the meaning of recipes that leave the option out, because the stored ones have the earlier value.

Options of other packages have no first defaults; today's stand for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.resolve import complete_evaluation
from agsm_rl.recipe.rewards import RewardEntry
from agsm_rl.recipe.schema import SHORT_FORM, Block, Evaluate
from agsm_rl.recipe.yaml_file import apply_overrides, read_yaml
from agsm_rl.registry import BUILTIN
from agsm_rl.source_code import arguments_in_source, own_options

FIRST_DEFAULTS = Path(__file__).with_name("first_defaults.yaml")


def read_earlier(file: Path, overrides: Iterable[str] = (), *, allow_imports: Collection[str] = ()) -> Recipe:
    """The recipe in a run folder, which an earlier version may have written; UserError as of `Recipe.from_yaml`."""
    data = with_first_defaults(read_yaml(file))
    apply_overrides(data, overrides)
    return Recipe.from_data(data, where=str(file), allow_imports=allow_imports)


def recipe_of_today(data: Mapping[str, Any], *, where: str, allow_imports: Collection[str] = ()) -> Recipe:
    """The recipe that stored data mean; UserError where they have what there is no more."""
    return Recipe.from_data(with_first_defaults(data), where=where, allow_imports=allow_imports)


def evaluation_of_today(data: Mapping[str, Any], parts: Parts) -> Evaluate:
    """The same for an `evaluate` section by itself."""
    return complete_evaluation(Evaluate.model_validate(_evaluation(data)), parts)


def block_of_today(kind: str, data: Mapping[str, Any], parts: Parts) -> Block:
    """The same for a single block, `{use: name, …}`."""
    return parts.complete(kind, Block.model_validate(_block(kind, data)), kind)


def reward_of_today(name: str, options: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The same for the options of a reward."""
    entry = RewardEntry(name, name, options=_filled(options, _of("rewards", name)))
    return parts.complete_reward(entry, name).options


def with_first_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """A stored recipe's data with the first default of each option that it lacks. What is malformed stays as it is."""
    recipe = _filled(data, _first_defaults()["recipe"])
    if "backbone" in recipe:
        recipe["backbone"] = _block("backbones", recipe["backbone"])
    if recipe["evaluate"] is not None:
        recipe["evaluate"] = _evaluation(recipe["evaluate"])
    if isinstance(recipe["optimizer"], Mapping):
        optimizer = _block("optimizers", recipe["optimizer"])
        recipe["optimizer"] = optimizer | {"schedule": _block("schedules", optimizer["schedule"])}
    for key in ("adapters", "sources"):
        if isinstance(recipe.get(key), Mapping):
            recipe[key] = {name: _block(key, block) for name, block in recipe[key].items()}
    if isinstance(recipe.get("objectives"), list):
        recipe["objectives"] = [_term(term) for term in recipe["objectives"]]
    return recipe


@cache
def _first_defaults() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FIRST_DEFAULTS.read_text(encoding="utf-8"))
    content["backbones"] |= _of_backbones(content["backbones"])
    return content


def _of_backbones(listed: Mapping[str, Any]) -> dict[str, Any]:
    """Every backbone has those of `auto`, and null for the options of one kind, as far as it takes them."""
    known = dict.fromkeys(own_options("backbones")) | listed["auto"]
    taken = {name: arguments_in_source(target) or {} for name, target in BUILTIN["backbones"].items()}
    return {name: {key: known[key] for key in known if key in options} for name, options in taken.items()}


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`given` and what it lacks of `defaults`, section by section."""
    filled = deepcopy(dict(defaults)) | dict(given)
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], default)
    return filled


def _term(term: Any) -> Any:
    if not isinstance(term, Mapping):
        return term
    filled = _filled(_block("objectives", term), _first_defaults()["term"])
    filled["source"] = _block("sources", filled.get("source"))
    filled["view"] = _block("views", filled["view"])
    return filled


def _block(kind: str, block: Any) -> Any:
    """A block with the first defaults of its options and of its rewards'; a source that is only named stays a name."""
    if not isinstance(block, Mapping):
        return block
    filled = _filled(block, _of(kind, block.get("use")))
    if isinstance(filled.get("rewards"), Mapping):
        filled["rewards"] = {key: _weighted_reward(key, given) for key, given in filled["rewards"].items()}
    return filled


def _evaluation(section: Any) -> Any:
    if not isinstance(section, Mapping):
        return section
    first = _first_defaults()["evaluate"]
    if section.get("suites") is not None:
        first = {key: value for key, value in first.items() if key not in SHORT_FORM}
    filled = _measured(_filled(section, first))
    if isinstance(filled.get("suites"), Mapping):
        filled["suites"] = {name: _suite(block) for name, block in filled["suites"].items()}
    return filled


def _suite(block: Any) -> Any:
    if not isinstance(block, Mapping):
        return block
    return _measured(_filled(_filled(block, _of("suites", block.get("use"))), _first_defaults()["suite"]))


def _measured(section: dict[str, Any]) -> dict[str, Any]:
    """With the first defaults of the options of its rewards, which are only measured."""
    if isinstance(section.get("rewards"), Mapping):
        section["rewards"] = {key: _reward(key, given or {}) for key, given in section["rewards"].items()}
    return section


def _weighted_reward(key: Any, given: Any) -> Any:
    """A reward in a source or an objective: its weight, or a mapping."""
    mapping = given if isinstance(given, Mapping) else {"weight": given}
    return _filled(_reward(key, mapping), _first_defaults()["weighted_reward"])


def _reward(key: Any, given: Any) -> Any:
    return _filled(given, _of("rewards", given.get("use") or key)) if isinstance(given, Mapping) else given


def _of(kind: str, name: Any) -> dict[str, Any]:
    options: dict[str, Any] = _first_defaults()[kind].get(name, {}) if isinstance(name, str) else {}
    return options
