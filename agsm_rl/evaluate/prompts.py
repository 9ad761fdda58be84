"""Numbered prompts to evaluate on, from the same kinds of files and data sets as prompts to train on."""

from __future__ import annotations

from typing import Any

from agsm_rl.sources import prompt_lists


def read_prompts(
    prompts: str, *, column: str | None = None, split: str | None = None, limit: int | None = None
) -> dict[int, dict[str, Any]]:
    """{number: {"prompt": text, and the row's other columns}} from what `sources.prompt_lists` reads.

    Args:
        prompts: A file, a data set, or the builtin prompts (by default 200 of their split `held_out`).
        column: The column that holds the prompts.
        split: The data set's split; by default its first.
        limit: How many prompts to read at most.

    Raises UserError if there are no prompts, or one is not text.
    """
    if prompts.startswith("builtin:"):
        split, limit = split or "held_out", limit or 200
    rows = prompt_lists.read_prompts(prompts, column=column, split=split, limit=limit, where="--prompts")
    return {number: {**row.metadata, "prompt": row.text} for number, row in enumerate(rows)}
