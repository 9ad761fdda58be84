"""Prompts alone, for objectives that draw their own images."""

from collections.abc import Mapping
from typing import Any

import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Shard
from agsm_rl.policy import Policy, Source
from agsm_rl.sources.order import Order
from agsm_rl.sources.prompt_lists import read_prompts
from agsm_rl.sources.rows import own_share


class Prompts(Source):
    """Batches of prompts in a random order; all come once before any comes again.

    Args:
        prompts: `builtin:shapes-prompts`; a text file with one prompt per line; a jsonl, json, csv, tsv or parquet
            table with a column `prompt`; or a folder or a name on the hub (`owner/name`) that holds one.
        batch_size: Prompts per step, the total over all processes.
        prompt_column: Name of the column that holds the prompts. Null looks for a usual one.
        prompt_split: Split of a data set of prompts; null is its first one.
        prompt_config: Configuration of a data set of prompts that has several.
    """

    gives: type[Batch] = Batch
    batch_size: int

    def __init__(
        self,
        prompts: str,
        batch_size: int = 8,
        *,
        prompt_column: str | None = None,
        prompt_split: str | None = None,
        prompt_config: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: got {batch_size}, but it must be 1 or more")
        self.prompts, self.batch_size = prompts, batch_size
        self.prompt_column, self.prompt_split, self.prompt_config = prompt_column, prompt_split, prompt_config

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Read the prompts; UserError if there are none."""
        self._own = own_share(self.batch_size, shard, name)
        rows = read_prompts(self.prompts, column=self.prompt_column, split=self.prompt_split, config=self.prompt_config)
        self._prompts, self._metadata = [row.text for row in rows], [row.metadata for row in rows]
        self._order = Order(len(self._prompts), seed, name)

    def prompt_texts(self) -> list[str]:
        """All prompts."""
        return self._prompts

    def next(self, policy: Policy) -> Batch:
        """The next prompts of this process."""
        chosen = self._order.take(self.batch_size)
        rows = torch.arange(self.batch_size)[self._own]
        own = chosen[self._own]
        metadata = [self._metadata[number] for number in own]
        return Batch(prompts=[self._prompts[number] for number in own], rows=rows, metadata=metadata)

    def state_dict(self) -> dict[str, Any]:
        """How many prompts were taken."""
        return {"position": self._order.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._order.position = int(state["position"])
