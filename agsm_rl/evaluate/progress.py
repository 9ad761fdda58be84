"""Progress of a long evaluation and the time left, on the run's display or one of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from agsm_rl.run.display import RunDisplay
from agsm_rl.run.screen import make_console, tell
from agsm_rl.training.stages import Advance, current_display, shown_by, stage


@contextmanager
def progress(
    what: str, *, total: int, done: int = 0, unit: str = "images", console: Console | None = None
) -> Iterator[Advance]:
    """Show `what` as done / total with the time left. Yields `advance(number)`.

    It is shown by the display that is installed (a run's, training/stages.py), or else on `console` (None: stderr).
    """
    console = console or make_console(stderr=True)
    display = current_display()
    if done and done == total:
        if display is None:
            tell(console, f"{what}: all {total} already done")
        yield lambda number: None
        return
    if display is not None:
        with stage(what, total=total, done=done, unit=unit, announce=True) as advance:
            yield advance
        return
    with RunDisplay(console) as shown, shown_by(shown), stage(what, total=total, done=done, unit=unit) as advance:
        yield advance
