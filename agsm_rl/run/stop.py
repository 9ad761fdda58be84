"""The end of a run before its last step: nothing is lost, and it can be resumed."""

import signal
from pathlib import Path


class Interrupted(Exception):
    """A signal arrived, and the work under way can be abandoned at this point; who catches it ends the run cleanly."""


class Ended(Exception):
    """The run ended early; `exit_code` is the shell's. Of several processes, those with `prints` print the message."""

    exit_code = 1
    prints = True


class Stopped(Ended):
    """The run was stopped by signal `number` after `step` steps; `during` adds what it interrupted, e.g. ` (…)`.

    `resume` is the command that continues it.
    """

    def __init__(self, resume: str, step: int, number: int, *, during: str = "", prints: bool = True) -> None:
        self.exit_code, self.prints = 128 + number, prints
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}{during}. To continue: {resume}")


class Lost(Ended):
    """Another process of the run ended or cannot be reached (`cause`), so this one cannot continue.

    `who` is this process, `checkpoint` the newest good one (None: there is none yet), `resume` the command that
    continues the run.
    """

    def __init__(
        self, resume: str, step: int, who: str, cause: str, *, checkpoint: Path | None, prints: bool = True
    ) -> None:
        self.prints = prints
        kept = f"the newest good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"{who}: lost after step {step}: {cause}. The launcher's report names the process that failed first "
            f"(exitcode -9 is SIGKILL: often the machine ran out of memory); {kept}. To continue, launch as before: "
            + resume
        )
