"""Prompts to evaluate on, numbered: from the same files and data sets as prompts to train on."""

from __future__ import annotations

from typing import Any

from agsm_rl.sources import prompt_lists


def read_prompts(
    prompts: str, *, column: str | None = None, split: str | None = None, limit: int | None = None
) -> dict[int, dict[str, Any]]:
    """Number → {"prompt"} of what `sources.prompt_lists` reads; of the builtin, 200 of the split `held_out`.

    column: of the prompts. split: of a data set, its first where none is named. limit: how many are read at most.
    UserError where there is none, or one is not a text.
    """
    if prompts.startswith("builtin:"):
        split, limit = split or "held_out", limit or 200
    rows = prompt_lists.read_prompts(prompts, column=column, split=split, limit=limit, where="--prompts")
    return {number: {"prompt": row.text} for number, row in enumerate(rows)}
