"""Progress of a long evaluation and the time left: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from agsm_rl.run.screen import make_console, make_progress, plain, tell

LINES = 10
"""Lines that a whole evaluation writes to a log."""


@contextmanager
def progress(
    what: str, *, total: int, done: int = 0, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show `what` as done / total with the time left, on stderr. Yields `advance(number)`."""
    console = console or make_console(stderr=True)
    if done and done == total:
        tell(console, f"{what}: all {total} already done")
        yield lambda number: None
        return
    with make_progress(console) as bar:
        task = bar.add_task(plain(what), total=total, completed=done, figures="")
        interval, now = max(1, total // LINES), done

        def advance(number: int) -> None:
            nonlocal now
            before, now = now, now + number
            bar.update(task, completed=now)
            if not console.is_terminal and (before // interval < now // interval or now == total):
                tell(console, f"{what} {now}/{total}")

        yield advance
