"""What the doctor found: green or red, a line, and a remedy for what is red."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`good` is green. `remedy` is empty where there is nothing to fix."""

    what: str
    good: bool
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'green' if self.good else 'red':<7}{self.what}: {' '.join(self.detail.split())}"
        return line if self.good else f"{line}\n       remedy: {self.remedy}"


def green(what: str, detail: str) -> Finding:
    """All is well."""
    return Finding(what, True, detail)


def red(what: str, detail: str, remedy: str) -> Finding:
    """Something is wrong."""
    return Finding(what, False, detail, remedy)
