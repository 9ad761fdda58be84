"""A JSON Schema of recipes for editors: names and options are completed, explained and checked while one types.

It is made from the pydantic models of the recipe's keys and from the signatures of what is registered, so it knows the
installed plug-ins too. It is a little wider than the recipe's own checks, which also know what goes together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema

from agsm_rl import registry
from agsm_rl.errors import UserError
from agsm_rl.recipe.meanings import about, keys_of, options_of
from agsm_rl.recipe.options import RewardOptions, Section, options_model
from agsm_rl.recipe.schema import Block, RecipeKeys, SuiteBlock, TermBlock
from agsm_rl.source_code import first_sentence

log = logging.getLogger(__name__)

DIALECT = "http://json-schema.org/draft-07/schema#"
"""What YAML plug-ins understand best."""
Schema = dict[str, Any]


class _Generator(GenerateJsonSchema):
    """Pydantic's, in which a type that JSON does not know may be anything."""

    def handle_invalid_for_json_schema(self, schema: CoreSchema, error_info: str) -> JsonSchemaValue:
        return {}

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        """Without defaults, which are told in the descriptions: some are objects of ours."""
        return self.generate_inner(schema["schema"])


def recipe_schema() -> Schema:
    """The schema of a recipe with all that is registered here."""
    schema = _of_section(RecipeKeys)
    kinds = {kind: _block_of_kind(kind) for kind in registry.KINDS if kind != "rewards"}
    definitions = schema.setdefault("definitions", {})
    definitions |= kinds | {"reward": _reward(weighted=True), "measured_reward": _reward(weighted=False)}
    properties = schema["properties"]
    properties["backbone"] |= _use("backbones")
    for kind in ("adapters", "sources"):
        properties[kind] |= {"type": "object", "additionalProperties": _use(kind)}
    term = _block_of_kind("objectives", TermBlock)
    term["properties"] |= {"source": {"anyOf": [{"type": "string"}, _use("sources")]}, "view": _or_null(_use("views"))}
    definitions |= {"objectives": term, "suites": _block_of_kind("suites", SuiteBlock)}
    properties["objectives"] |= {"type": "array", "items": _use("objectives")}
    _optimizer(definitions["Optimizer"])
    _evaluation(definitions)
    return {"$schema": DIALECT, "title": "agsm-rl recipe", **schema}


def _use(kind: str) -> Schema:
    return {"$ref": f"#/definitions/{kind}"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _of_section(section: type[Section]) -> Schema:
    """Pydantic's schema of a section, with each key's meaning."""
    schema = section.model_json_schema(
        schema_generator=_Generator, ref_template="#/definitions/{model}", by_alias=False, mode="validation"
    )
    schema["definitions"] = schema.pop("$defs", {})
    _describe(schema, section)
    for part in _sections_in(section):
        if part.__name__ in schema["definitions"]:
            _describe(schema["definitions"][part.__name__], part)
    return schema


def _sections_in(section: type[Section]) -> list[type[Section]]:
    """The sections that a section's keys hold, as pydantic names them."""
    found = {kind.__name__: kind for kind in Section.__subclasses__() + Block.__subclasses__()}
    return [kind for kind in found.values() if kind is not section]


def _describe(schema: Schema, section: type[Section]) -> None:
    schema.pop("title", None)
    schema["description"] = first_sentence(about(section))
    for option in keys_of(section):
        if option.name in schema.get("properties", {}):
            place = schema["properties"][option.name]
            place.pop("title", None)
            place["description"] = _meaning(option.meaning, option.default)


def _meaning(meaning: str, default: str | None) -> str:
    return meaning if default is None else f"{meaning} Default: {default}.".strip()


def _block_of_kind(kind: str, keys: type[Block] = Block) -> Schema:
    """A block of a kind: `use` says what else it may hold."""
    shared = _of_section(keys)
    common = shared["properties"]
    names = registry.available(kind)
    common["use"] = {
        "description": f"The name of {registry.NOUNS[kind]} (`agsm-rl list {kind}`), or module:Class.",
        "anyOf": [{"enum": list(names)}, {"type": "string", "pattern": ":"}],
    }
    cases = []
    for name in names:
        options = _options(kind, name)
        if options is not None:
            described = {"properties": options["properties"] | common_keys(common)}
            cases.append(
                {
                    "if": {"properties": {"use": {"const": name}}, "required": ["use"]},
                    "then": described | {"required": options.get("required", []), "additionalProperties": False},
                }
            )
    return {
        "type": "object",
        "required": sorted({"use", *shared.get("required", [])}),
        "properties": common,
        "allOf": cases,
    }


def common_keys(properties: Mapping[str, Any]) -> Schema:
    """Keys that are described once, beside the cases: here they are only allowed."""
    return {key: {} for key in properties}


def _options(kind: str, name: str) -> Schema | None:
    """The options of what is registered under a name; None where it cannot be imported, or its types are unknown."""
    try:
        registered = registry.load(kind, name, where=name)
        if kind == "rewards":
            from agsm_rl_rewards.functions import reward_maker

            registered = reward_maker(registered)
        schema = _inlined(options_model(registered, where=name), registered, name)
    except UserError as error:
        log.warning("%s: left out of the schema: %s", name, error)
        return None
    if "rewards" in schema["properties"]:
        schema["properties"]["rewards"] = {
            "type": "object",
            "description": "Rewards by name: a weight, or {weight, normalise, options…}.",
            "minProperties": 1,
            "additionalProperties": _use("reward"),
        }
    return schema


def _inlined(model: type[Section], registered: Any, name: str) -> Schema:
    schema = model.model_json_schema(schema_generator=_Generator, mode="validation")
    definitions = schema.pop("$defs", {})
    meanings = {option.name: _meaning(option.meaning, option.default) for option in options_of(registered, where=name)}
    properties = {}
    for key, option in schema.get("properties", {}).items():
        option = _resolved(option, definitions)
        option.pop("title", None)
        properties[key] = option | ({"description": meanings[key]} if meanings.get(key) else {})
    return {"properties": properties, "required": schema.get("required", [])}


def _resolved(part: Any, definitions: Mapping[str, Any]) -> Any:
    """With what it refers to in place of the references."""
    if isinstance(part, dict):
        if "$ref" in part:
            return _resolved(definitions[part["$ref"].rpartition("/")[2]], definitions)
        return {key: _resolved(value, definitions) for key, value in part.items()}
    return [_resolved(item, definitions) for item in part] if isinstance(part, list) else part


def _reward(*, weighted: bool) -> Schema:
    """A reward in a source or an objective (with a weight), or one that is only measured."""
    options = _of_section(RewardOptions)["properties"] if weighted else {"use": {"type": ["string", "null"]}}
    mapping = {"type": "object", "properties": options}
    return {"anyOf": [{"type": "number"}, mapping]} if weighted else _or_null(mapping)


def _optimizer(schema: Schema) -> None:
    """The optimizer's and the schedule's own options go beside their `use`."""
    from agsm_rl.training.optimizers import OPTIMIZERS
    from agsm_rl.training.schedules import SCHEDULES

    schema["properties"]["use"] = {"enum": [*OPTIMIZERS], "description": "Name of the optimizer."}
    schedule = {"type": "object", "required": ["use"], "properties": {"use": {"enum": [*SCHEDULES]}}}
    schema["properties"]["schedule"] = {
        "anyOf": [{"enum": [*SCHEDULES]}, schedule],
        "description": schema["properties"]["schedule"].get("description", ""),
    }


def _evaluation(definitions: Schema) -> None:
    """Values that may be given in a short form."""
    evaluate = definitions["Evaluate"]["properties"]
    _may_be_single(evaluate["guidance"])
    _may_be_single(definitions["Samples"]["properties"]["guidance"])
    names = {"type": "array", "items": {"anyOf": [{"enum": [*registry.available("rewards")]}, {"pattern": ":"}]}}
    by_name = {"type": "object", "additionalProperties": _use("measured_reward")}
    for place in (evaluate, definitions["suites"]["properties"]):
        place["rewards"] = {"anyOf": [names, by_name], "description": place["rewards"].get("description", "")}
    suites = {"type": "object", "minProperties": 1, "additionalProperties": _use("suites")}
    evaluate["suites"] = _or_null(suites) | {"description": evaluate["suites"].get("description", "")}


def _may_be_single(schema: Schema) -> None:
    """A list that may be given as its only item."""
    listed = {key: schema.pop(key) for key in ("type", "items", "minItems") if key in schema}
    schema["anyOf"] = [listed, listed["items"]]
