"""What the program is doing and how far it is: reported from anywhere, shown by the display of a run or a command.

Without a display nothing is shown, so that the other processes of a run, and programs that use the library, are silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

Advance = Callable[[float], None]
"""Reports that so many more units are done."""


@dataclass(eq=False)
class Stage:
    """A stage of the work, such as `evaluating base: guidance 7`, with `done` of `total` units finished.

    `total` None: it cannot be counted. `worth`: how many units of the enclosing stage it is about.
    """

    what: str
    total: float | None = None
    done: float = 0
    unit: str = ""
    worth: float = 0
    announce: bool = False
    started: float = field(default=0.0, init=False)
    """When it began, by the clock of the display."""
    done_before: float = field(init=False)
    """What was done when the stage began: a resumed one must not count it when it estimates the time left."""

    def __post_init__(self) -> None:
        self.done_before = self.done


class Display(Protocol):
    """Shows stages."""

    def open(self, stage: Stage) -> None:
        """A stage begins, within those that are open."""
        ...

    def close(self, stage: Stage) -> None:
        """It has ended."""
        ...


_display: Display | None = None


def current_display() -> Display | None:
    """The display that stages are shown on, if there is one."""
    return _display


@contextmanager
def shown_by(display: Display | None) -> Iterator[None]:
    """Within the block, stages are shown by `display` (None: by nothing)."""
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before


@contextmanager
def stage(
    what: str, *, total: float | None = None, done: float = 0, unit: str = "", worth: float = 0, announce: bool = False
) -> Iterator[Advance]:
    """Within the block, show that `what` is being done; yields `advance(number)`, to be called as units are finished.

    Args:
        what: What is being done, beginning with a verb: `loading the base`.
        total: The number of units. None: it cannot be counted.
        done: Units that were finished before, such as images drawn by an earlier command.
        unit: What is counted, in the plural.
        worth: How many units of the enclosing stage this one is about, so that that one advances smoothly: as this one
            does, or, without `total`, to their end. They are finished when the enclosing stage is advanced by them.
        announce: In a log, print a line as soon as the stage begins; others are mentioned if they take long.
    """
    begun = Stage(what, total, done, unit, worth, announce)

    def advance(number: float = 1) -> None:
        begun.done += number if begun.total is None else min(number, begun.total - begun.done)

    display = _display
    if display is None:
        yield advance
        return
    display.open(begun)
    try:
        yield advance
    finally:
        display.close(begun)
