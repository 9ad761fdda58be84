"""Names for what has none of its own."""

from collections.abc import Collection


def free_name(name: str, taken: Collection[str | None]) -> str:
    """The first of name, name_2, name_3, … that is not taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
