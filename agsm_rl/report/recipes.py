"""The variants' resolved recipes, and the keys in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from agsm_rl.report.load import Loaded, with_text_keys

ABSENT = "–"
MISSING = object()


def differences(loaded: Loaded) -> list[tuple[str, list[str]]]:
    """(key.path, its value in each variant) where variants differ, the seed aside.

    A block that not every variant has gets one row for all of it; ABSENT where a recipe has none.
    """
    recipes = [_by_name(variant.runs[0].recipe) for variant in loaded.all_variants]
    return [(place, values) for place, values in _rows(recipes, "") if place != "seed"]


def _rows(values: list[Any], place: str) -> list[tuple[str, list[str]]]:
    if all(isinstance(value, Mapping) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return [
            row
            for key in keys
            for row in _rows([value.get(key, MISSING) for value in values], f"{place}.{key}" if place else str(key))
        ]
    texts = [_text(value) for value in values]
    return [(place, texts)] if len(set(texts)) > 1 else []


def _by_name(value: Any) -> Any:
    """Lists of blocks as mappings by the blocks' names, so that a term is compared with its like."""
    if isinstance(value, Mapping):
        return {str(key): _by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {str(item.get("name") or number): _by_name(item) for number, item in enumerate(value)}
    return value


def _text(value: Any) -> str:
    """A value in one line; a block without what is null in it."""
    if value is MISSING:
        return ABSENT
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items() if item is not None) + "}"
    return value if isinstance(value, str) else json.dumps(with_text_keys(value), ensure_ascii=False, default=str)


def texts(loaded: Loaded) -> list[tuple[str, str]]:
    """(variant, its recipe as YAML), each variant's first seed; an evaluation's file has none."""
    return [
        (variant.name, yaml.safe_dump(variant.runs[0].recipe, sort_keys=False, allow_unicode=True, width=100))
        for variant in loaded.all_variants
        if variant.runs[0].file is None
    ]
