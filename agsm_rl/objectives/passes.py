"""Learning from a batch in several passes, so that fewer activations are held at a time: the same gradient."""

from typing import TypeVar

import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch

Rows = TypeVar("Rows", bound=Batch)


def check_at_least_one(name: str, value: int | None) -> None:
    """UserError unless the option is left out (None) or 1 or more."""
    if value is not None and value < 1:
        raise UserError(f"{name}: got {value}, but it must be 1 or more")


def in_passes(batch: Rows, rows_per_pass: int | None) -> list[tuple[Rows, float]]:
    """Parts of at most `rows_per_pass` rows (None: all at once), each with its share of the batch's mean."""
    if rows_per_pass is None or rows_per_pass >= len(batch):
        return [(batch, 1.0)]
    parts = [batch.select(index) for index in torch.arange(len(batch)).split(rows_per_pass)]
    return [(part, len(part) / len(batch)) for part in parts]
