"""Strategies for files that nobody meant to write: odd values, a good file with one value replaced, damaged bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "\x1b[2J\x1b]0;title\x07",
        "[/b][bold]",
        "../../outside",
        "/dev/zero",
        "~",
        "~nobody/x",
        "nan",
        "1e999",
        "builtin:",
        "a" * 5000,
        "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
        "module:attribute",
        "🙂\u2028\u0000x",
        "{{ 7 * 7 }}",
        "%s%n",
    ]
)
NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        10**18,
        10**400,
        0.0,
        -0.5,
        1e-300,
        1e308,
        float("inf"),
        float("-inf"),
        float("nan"),
    ]
)
SCALARS = st.one_of(NUMBERS, ODD_TEXTS, st.booleans(), st.none(), st.integers(), st.text(max_size=20))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside nested dicts and lists."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield (*at, key)
            yield from places(value, (*at, key))


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """`content` with one to three of its values replaced, removed, or joined by an unknown key."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(content))
        if not paths:
            return draw(VALUES)
        path = draw(st.sampled_from(paths))
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            holder[path[-1]] = draw(VALUES)
        elif action == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(st.one_of(st.text(max_size=12), ODD_TEXTS))] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return content


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut short, with flipped or inserted bytes, emptied, or replaced by something else altogether."""
    action = draw(st.sampled_from(["cut", "flip", "insert", "empty", "other", "repeat"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if action == "cut":
        return content[:place]
    if action == "flip":
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if action == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
    if action == "repeat":
        return content * 2
    return b"" if action == "empty" else draw(st.binary(max_size=200)) or b"[" * 50_000
