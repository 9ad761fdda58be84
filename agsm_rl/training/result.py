"""What `Trainer.train()` shows while it runs, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from agsm_rl.interfaces import Adapter

Advance = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a training has done.

    Attributes:
        steps: Steps that are done, those before a resumed training too.
        adapters: The policy's adapters by name, as they are now; `save_adapters` writes them.
        history: The metrics of each step of this call, with `step` counted from 1 (docs/metrics.md).
    """

    steps: int
    adapters: Mapping[str, Adapter]
    history: list[dict[str, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        last = f", loss {self.history[-1]['loss']:.4g}" if self.history else ""
        return f"<TrainingResult after {self.steps} steps{last}; adapters: {', '.join(self.adapters)}>"


@contextmanager
def step_bar(total: int, *, done: int, shown: bool) -> Iterator[Advance]:
    """A bar with the loss and the time left, on a terminal or in a notebook, and only if `shown`.

    Yields what is called after each step, with its number and its metrics.
    """
    console = Console(stderr=True)
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    progress = Progress(
        TextColumn("{task.description}"),
        *columns,
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
        console=console,
        disable=not (shown and (console.is_terminal or console.is_jupyter)),
    )
    with progress:
        task = progress.add_task("training", total=total, completed=done, loss="-")

        def advance(step: int, metrics: Mapping[str, float]) -> None:
            progress.update(task, completed=step, loss=f"{metrics['loss']:.4g}")

        yield advance
