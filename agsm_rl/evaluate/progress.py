"""How far a long evaluation has come and how long it will take: a bar on a terminal, some lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 10
"""Lines in a log for a whole evaluation."""


@contextmanager
def progress(
    what: str, *, total: int, done: int = 0, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show `what` as done / total with the time left, on stderr; yields `advance(number)`."""
    console = console or Console(stderr=True)
    if done and done == total:
        console.print(f"{what}: all {total} were there", highlight=False)
        yield lambda number: None
        return
    bar = Progress(
        TextColumn(what),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total, completed=done)
        interval, now = max(1, total // LINES), done

        def advance(number: int) -> None:
            nonlocal now
            before, now = now, now + number
            bar.update(task, completed=now)
            if not console.is_terminal and (before // interval < now // interval or now == total):
                console.print(f"{what} {now}/{total}", highlight=False)

        yield advance
