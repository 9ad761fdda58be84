"""The rewards that `agsm-rl eval` is given: on the command line, in a YAML file, or by a run's recipe."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.files import read_text
from agsm_rl.recipe.options import validated
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.reward_specs import RewardSpec
from agsm_rl.recipe.rewards import in_evaluation
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.recipe.yaml_file import parse_yaml

MAX_BYTES = 1_000_000
"""Largest size of a rewards file."""


def parse_rewards(
    given: Sequence[str], file: Path | None = None, *, allow_imports: Collection[str] = ()
) -> list[RewardSpec]:
    """Parse `NAME` or `NAME:option=value,…`, and a YAML file of {name: weight} or {name: {weight, options…}}.

    UserError for an unknown name or option (with the nearest match), or if there is no reward.
    """
    parts = Parts(where="--reward", allow_imports=allow_imports)
    specs = [_parse(text, parts) for text in given]
    if file is not None:
        specs += _read_yaml(file, Parts(where=str(file), allow_imports=allow_imports))
    if not specs:
        raise UserError("--suite rewards: no reward given; name one or more, e.g. --reward jpeg_compressibility.")
    labels = [spec.label for spec in specs]
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise UserError(f"--reward {repeated[0]}: is listed twice; list each reward once.")
    return specs


def rewards_of(evaluate: Evaluate, *, where: str, allow_imports: Collection[str] = ()) -> list[RewardSpec]:
    """The rewards that a run's recipe evaluates; each counts once in `overall`, under whatever name it has there."""
    parts = Parts(where=f"{where}: evaluate.rewards", allow_imports=allow_imports)
    entries = [entry for block in evaluate.blocks.values() for entry in in_evaluation(block.rewards)]
    specs = [_spec(entry.use, entry.options, 1.0, parts) for entry in entries]
    return list({spec.label: spec for spec in specs}.values())


def _parse(text: str, parts: Parts) -> RewardSpec:
    """`name`, `name:key=value,…`, `module:Class` or `module:Class:key=value,…`."""
    parted = re.fullmatch(
        r"(.*?):(\w+=.*)", text, re.DOTALL
    )  # split at the first colon before an option: a URL has more
    name, listed = parted.groups() if parted else (text, "")
    options: dict[str, Any] = {}
    for piece in filter(None, listed.split(",")):
        key, equals, value = piece.partition("=")
        if not equals:
            raise UserError(f"--reward {text}: '{piece}' is not an option; write NAME:option=value,option=value.")
        # The constructor's types turn text into numbers; only null, lists and mappings are read as YAML.
        is_yaml = value in ("null", "none") or value[:1] in "[{"
        options[key] = parse_yaml(value, where=f"--reward {text:.200}: {key}") if is_yaml else value
    return _spec(name, options, 1.0, parts)


def _read_yaml(file: Path, parts: Parts) -> list[RewardSpec]:
    content = parse_yaml(read_text(file, max_bytes=MAX_BYTES), where=str(file))
    content = content.get("rewards", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: must map reward names to options, e.g. `hpsv2: {{weight: 1.0, version: '2.1'}}`.")
    specs = []
    for name, value in content.items():
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"{file}: {name}: the weight is {weight!r}; give a number, or {{weight: 1.0, option: …}}.")
        specs.append(_spec(str(name), options, float(weight), parts))
    return specs


def _spec(name: str, options: dict[str, Any], weight: float, parts: Parts) -> RewardSpec:
    """The reward with its options converted to the constructor's types and completed with its defaults."""
    complete = validated(parts.load("rewards", name, name), options, where=f"{parts.where}: {name}")
    return RewardSpec(name, {key: complete[key] for key in options}, weight, complete, parts=parts)
