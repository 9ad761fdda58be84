"""The display of a run or a command: the training's step and figures, and the stages of the work (training/stages.py).

On a terminal it is redrawn in place, and made for 80 columns. A log gets lines: when a long stage begins or has
lasted for a while, and some twenty in all from the training itself (callbacks.ProgressBar).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from agsm_rl.run.screen import is_quiet, make_console, plain, styled, tell
from agsm_rl.training.stages import Stage, shown_by, stage

REFRESHED = 4
"""Times a second that a terminal is redrawn."""
PATIENCE = 10.0
"""Seconds after which a log mentions a stage that it did not announce."""
SHORTEST_GAP, LONGEST_GAP = 20.0, 300.0
"""Seconds between two lines of a log about the same stage: a quarter of its age, within these limits."""
BAR = 18
"""Characters of a bar, where there is room for that many."""


class Bar(Protocol):
    """What a display shows above the stages, and leaves on the terminal when it is done."""

    def lines(self, width: int, *, ascii_only: bool) -> list[Text]:
        """Its lines now."""
        ...


class RunDisplay:
    """Within the block, shows stages and a training on a console; nothing if the console is quiet or not `enabled`."""

    def __init__(self, console: Console, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console, clock
        self._enabled = enabled and not is_quiet(console)
        self._on_terminal = console.is_terminal
        self._stages: list[Stage] = []
        self._told: dict[Stage, float] = {}
        """When a log mentioned a stage for the last time."""
        self.notice = ""
        """A line that stays on the display, and that a log gets once; may be set by a signal's handler."""
        self._noticed = ""
        self._bar: Bar | None = None
        self._leaves = False
        self._live: Live | None = None
        self._left = threading.Event()

    def __enter__(self) -> Self:
        if self.prints_lines:
            threading.Thread(target=self._watch, name="display", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._stages.clear()
        self._stop_live()

    @property
    def prints_lines(self) -> bool:
        """Whether it is a log, into which progress goes line by line."""
        return self._enabled and not self._on_terminal

    @contextmanager
    def training(self, bar: Bar) -> Iterator[None]:
        """Within the block, `bar` is shown above the stages; on a terminal, it stays there."""
        self._bar, self._leaves = bar, False
        self._start_live()
        try:
            yield
        finally:
            self._leaves = True
            self._stop_live(leave=True)
            self._bar = None

    def open(self, stage: Stage) -> None:
        """Show a stage, within those that are open."""
        stage.started = self._clock()
        self._stages.append(stage)
        self._start_live()
        if stage.announce and self.prints_lines:
            self._tell(stage, describe(stage, self._clock()))

    def close(self, stage: Stage) -> None:
        """Take a stage away; one that was counted, and not part of a training, stays on a terminal as it ended.

        A log says that it has ended if it took long.
        """
        if self._bar is None and self._stages == [stage]:
            self._stop_live(leave=stage.total is not None)
        if stage in self._stages:
            self._stages.remove(stage)
        if stage in self._told and self._clock() - stage.started >= PATIENCE:
            self._tell(stage, describe_finished(stage, self._clock()))
        self._told.pop(stage, None)

    def tell_if_due(self) -> None:
        """In a log, print a new notice, and the outermost stage if it was last mentioned long ago."""
        if self.notice != self._noticed:
            self._noticed = self.notice
            tell(self.console, self.notice)
        stages = list(self._stages)
        if not stages:
            return
        now, stage = self._clock(), stages[0]
        age = now - stage.started
        gap = min(max(age / 4, SHORTEST_GAP), LONGEST_GAP)
        last = self._told.get(stage)
        if age >= PATIENCE if last is None else now - last >= gap:
            inner = f" ({describe(stages[-1], now)})" if len(stages) > 1 else ""
            self._tell(stage, describe(stage, now, stages[1:]) + inner)

    def _tell(self, stage: Stage, text: str) -> None:
        self._told[stage] = self._clock()
        tell(self.console, text)

    def _watch(self) -> None:
        while not self._left.wait(1.0):
            self.tell_if_due()

    def _start_live(self) -> None:
        if not (self._enabled and self._on_terminal) or self._live is not None:
            return
        to_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=REFRESHED,
            redirect_stdout=to_terminal,  # what goes into a file must not end up here
            transient=True,
        )
        self._live.start()

    def _stop_live(self, *, leave: bool = False) -> None:
        if self._live is not None:
            self._live.transient = not leave
            self._live.stop()
            self._live = None

    def render(self) -> Group:
        """What a terminal shows now: the training's lines, then the outermost and the innermost stage."""
        width, ascii_only = self.console.width, self.console.options.ascii_only
        lines = [] if self._bar is None else self._bar.lines(width, ascii_only=ascii_only)
        stages, now = list(self._stages), self._clock()
        if stages:
            lines.append(stage_line(stages, now, width, ascii_only=ascii_only))
        if len(stages) > 1:
            lines.append(fit(f"  {describe(stages[-1], now)}", width))
        if self.notice:
            lines.append(fit(self.notice, width))
        if self._bar is not None and not stages and not self._leaves:
            lines.append(Text(""))  # kept free for stages, so that the lines above do not jump
        return Group(*lines)


@contextmanager
def saying(what: str, *, enabled: bool = True) -> Iterator[None]:
    """Within the block, which comes before a run has its display, say on stderr what is being done."""
    with RunDisplay(make_console(stderr=True), enabled=enabled) as display, shown_by(display), stage(what):
        yield


def describe(stage: Stage, now: float, inner: Sequence[Stage] = ()) -> str:
    """A stage in words: `evaluating base: guidance 7, 150/600 images, 3 min left`."""
    return ", ".join([stage.what, *_figures(stage, now, inner)])


def describe_finished(stage: Stage, now: float) -> str:
    """The same when it has ended: `evaluating base: guidance 7, 600/600 images after 12 min`."""
    count = "ended" if stage.total is None else _count(stage)
    return f"{stage.what}, {count} after {duration(now - stage.started)}"


def stage_line(stages: Sequence[Stage], now: float, width: int, *, ascii_only: bool) -> Text:
    """The outermost stage on one line of a terminal, with a bar where it can be counted and there is room."""
    stage = stages[0]
    figures = "  ".join(_figures(stage, now, stages[1:]))
    if not stage.total:
        return fit(f"{stage.what}  {figures}", width)
    room = width - len(figures) - 4
    bar = min(BAR, room - len(stage.what))
    if bar < 5:
        bar = min(BAR, max(0, room - 24))
    name = _cut(plain(stage.what), max(1, room - bar))
    share = _done(stage, stages[1:]) / stage.total
    return fit(Text.assemble(name, "  ", make_bar(share, bar, ascii_only=ascii_only), "  ", figures), width)


def make_bar(share: float, width: int, *, ascii_only: bool = False) -> Text:
    """A bar of so many characters; with or without colours, what is done looks other than what is left."""
    done, left = ("=", "-") if ascii_only else ("━", "─")
    filled = max(0, min(width, int(share * width)))
    return Text.assemble((done * filled, "green"), (left * (width - filled), "dim"))


def fit(text: str | Text, width: int) -> Text:
    """One line of at most `width` characters."""
    line = styled(text) if isinstance(text, str) else text
    line.no_wrap = True
    line.truncate(width, overflow="ellipsis")
    return line


def in_lines(parts: Sequence[str], width: int, *, indent: str = "  ") -> list[Text]:
    """Parts side by side, as many to a line as there is room for; none is broken."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(indent + part)
    return [fit(line, width) for line in lines]


def duration(seconds: float) -> str:
    """A time as a person says it: `40 s`, `3 min`, `1 h 20 min`, `2 d 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def _figures(stage: Stage, now: float, inner: Sequence[Stage]) -> list[str]:
    """How far it is, and the time left; the time that has passed as long as that is not known."""
    figures = [] if stage.total is None else [_count(stage)]
    passed, done = now - stage.started, _done(stage, inner)
    if stage.total is not None and done > stage.done_before:
        if done >= stage.total:
            return [*figures, f"after {duration(passed)}"] if passed >= PATIENCE else figures
        left = passed * (stage.total - done) / (done - stage.done_before)
        return [*figures, f"{duration(left)} left"]
    return [*figures, f"{duration(passed)} so far"] if passed >= PATIENCE else figures


def _count(stage: Stage) -> str:
    return f"{int(stage.done)}/{stage.total:.0f} {stage.unit}".rstrip()


def _done(stage: Stage, inner: Sequence[Stage]) -> float:
    """Units that are finished, with the share of those that an inner stage is working on."""
    done = stage.done
    if inner and inner[0].worth:
        total = inner[0].total
        done += inner[0].worth * (_done(inner[0], inner[1:]) / total if total else 1)
    return min(done, stage.total) if stage.total is not None else done


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
