"""The end of a run before its last step: nothing is lost, and it can be continued."""

import signal
from pathlib import Path


class Interrupted(Exception):
    """A signal came, and what is under way can be left at this point; whoever catches it ends the run in order."""


class Ended(Exception):
    """The run ended early; `exit_code` is the shell's. Of several processes, those with `tells` print the message."""

    exit_code = 1
    tells = True


class Stopped(Ended):
    """The run was stopped by signal `number` after `step` steps; `during` says in what else, such as ` (…)`."""

    def __init__(self, recipe: Path, step: int, number: int, *, during: str = "", tells: bool = True) -> None:
        self.exit_code, self.tells = 128 + number, tells
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}{during}. To continue: agsm-rl train {recipe} --resume")


class Lost(Ended):
    """Another process of the run ended or cannot be reached (`cause`), so that this one cannot go on.

    `who` is this process, `checkpoint` the newest good one (None: there is none yet).
    """

    def __init__(
        self, recipe: Path, step: int, who: str, cause: str, *, checkpoint: Path | None, tells: bool = True
    ) -> None:
        self.tells = tells
        kept = f"the newest good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"{who}: lost after step {step}: {cause}. The launcher's report names the process that failed first "
            f"(exitcode -9 is SIGKILL: often memory that ran out); {kept}. To continue, launch as before: "
            f"agsm-rl train {recipe} --resume"
        )
