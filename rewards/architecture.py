"""The sizes of a network whose weight file does not state them: the published ones, or changes to them."""

from collections.abc import Mapping
from typing import Any

from agsm_rl.errors import UserError, unknown_name

Sizes = dict[str, dict[str, Any]]


def with_changes(published: Sizes, changes: Mapping[str, Mapping[str, Any]] | None) -> Sizes:
    """The published sizes with some replaced, part by part; UserError for an unknown part or size."""
    sizes = {part: dict(values) for part, values in published.items()}
    for part, values in (changes or {}).items():
        if part not in sizes:
            raise unknown_name("architecture", part, "a part of this network", sizes)
        for key, value in values.items():
            if key not in sizes[part]:
                raise unknown_name(f"architecture.{part}", key, "a size of this part", sizes[part])
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"architecture.{part}.{key}: got {value!r}, but it must be a whole number above 0")
            sizes[part][key] = value
    return sizes
