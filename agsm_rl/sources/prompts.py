"""Prompts alone, for objectives that draw their own images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Shard
from agsm_rl.policy import Policy, Source
from agsm_rl.sources.order import Order
from agsm_rl.sources.rows import own_share

BUILTIN_PROMPTS = "builtin:shapes-prompts"


class Prompts(Source):
    """Batches of prompts in a random order; all come once before any comes again.

    Args:
        prompts: `builtin:shapes-prompts`, or a text file with one prompt per line.
        batch_size: Prompts per step, the total over all processes.
    """

    gives: type[Batch] = Batch
    batch_size: int

    def __init__(self, prompts: str, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: got {batch_size}, but it must be 1 or more")
        self.prompts, self.batch_size = prompts, batch_size

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Read the prompts; UserError if there are none."""
        self._own = own_share(self.batch_size, shard, name)
        self._prompts = open_prompts(self.prompts)
        self._order = Order(len(self._prompts), seed, name)

    def next(self, policy: Policy) -> Batch:
        """The next prompts of this process."""
        chosen = self._order.take(self.batch_size)
        rows = torch.arange(self.batch_size)[self._own]
        return Batch(prompts=[self._prompts[number] for number in chosen[self._own]], rows=rows)

    def state_dict(self) -> dict[str, Any]:
        """How far it has come."""
        return {"position": self._order.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._order.position = int(state["position"])


def open_prompts(prompts: str) -> list[str]:
    """The prompts of a builtin or of a text file, a line each."""
    if prompts == BUILTIN_PROMPTS:
        from agsm_rl.shapes import data

        return data.prompts("train", 2000, seed=0)
    path = Path(prompts)
    if prompts.startswith("builtin:") or not path.is_file():
        raise UserError(
            f"prompts '{prompts}': there is no such file; give a text file with a prompt a line, or '{BUILTIN_PROMPTS}'"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts '{prompts}': it cannot be read as text ({error}); save it as UTF-8") from error
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"prompts '{prompts}': the file has no prompts; write one a line")
    return found
