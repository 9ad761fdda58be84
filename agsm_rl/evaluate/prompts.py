"""Numbered prompts to evaluate on, from the same kinds of files and data sets as prompts to train on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from agsm_rl.sources import prompt_lists


def read_prompts(
    prompts: str,
    *,
    column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    where: str = "--prompts",
) -> dict[int, dict[str, Any]]:
    """{number: {"prompt": text, other columns}} from what `sources.prompt_lists` reads.

    Args:
        prompts: A file, a data set, or the builtin prompts (by default 200 of their split `held_out`).
        column: The column that holds the prompts.
        split: The data set's split; by default its first.
        limit: How many prompts to read at most.
        where: The key or option, for messages.

    Raises UserError if there are no prompts, or one is not text.
    """
    if prompts.startswith("builtin:"):
        split, limit = split or "held_out", limit or 200
    rows = prompt_lists.read_prompts(prompts, column=column, split=split, limit=limit, where=where)
    return {number: {"prompt": row.text} | _plain(row.metadata) for number, row in enumerate(rows)}


@dataclass
class PromptList:
    """A list of prompts as a suite's options name it, read when it is first needed.

    `num_images` is the number of images to draw: of as many prompts, or more if the list is shorter.
    """

    prompts: str | None
    column: str | None = None
    split: str | None = None
    num_given: int | None = None
    where: str = "prompts"
    _rows: dict[int, dict[str, Any]] | None = None

    @property
    def num_images(self) -> int:
        """The number given, or one image of each prompt."""
        return self.num_given or (len(self.read()) if self.prompts is not None else 0)

    def read(self) -> dict[int, dict[str, Any]]:
        """The prompts by number; UserError if they cannot be read."""
        assert self.prompts is not None
        if self._rows is None:
            self._rows = read_prompts(
                self.prompts, column=self.column, split=self.split, limit=self.num_given, where=self.where
            )
        return self._rows


def _plain(metadata: Any) -> dict[str, Any]:
    """The other columns as plain JSON; what JSON has no form for becomes text."""
    content: dict[str, Any] = json.loads(json.dumps(dict(metadata), default=str))
    return {key: value for key, value in content.items() if key != "prompt"}
