"""A finding of the doctor: green, or red with a remedy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's output. `good` means green; `remedy` is empty if there is nothing to fix."""

    what: str
    good: bool
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'green' if self.good else 'red':<7}{self.what}: {' '.join(self.detail.split())}"
        return line if self.good else f"{line}\n       remedy: {self.remedy}"


def green(what: str, detail: str) -> Finding:
    """A finding that needs no action."""
    return Finding(what, True, detail)


def red(what: str, detail: str, remedy: str) -> Finding:
    """A finding that needs fixing."""
    return Finding(what, False, detail, remedy)
