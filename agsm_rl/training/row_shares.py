"""Rows that processes share unevenly: what makes the mean over processes the mean over all their rows.

A view leaves some processes more rows than others, or none. A process without rows still takes part in every exchange.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from agsm_rl.training.processes import Processes

Key = TypeVar("Key", str, int)


@dataclass(frozen=True)
class RowShare:
    """This process's part of a term's rows: `total` over all processes, and the `weight` of its mean, n · P / total.

    `is_filled`: some process has no rows; all then exchange the same keys, zeros where a process has none.
    """

    total: int
    weight: float = 1.0
    is_filled: bool = False


def share_of(rows: int, processes: Processes) -> RowShare:
    """The share of a process that sees so many rows."""
    counts = processes.numbers(float(rows))
    total = int(counts.sum())
    if not total:
        return RowShare(0)
    return RowShare(total, rows * processes.count / total, is_filled=bool((counts == 0).any()))


def filled(
    values: dict[Key, Tensor], keys: Iterable[Key], like: Callable[[Key], Tensor] = lambda key: torch.zeros(())
) -> dict[Key, Tensor]:
    """The values in the order of `keys`, with zeros for those that this process lacks."""
    return {key: values[key] if key in values else torch.zeros_like(like(key)) for key in keys}
