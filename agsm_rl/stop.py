"""The end of a run by a signal: nothing is lost, and it can be continued."""

import signal
from pathlib import Path


class Stopped(Exception):
    """The run was stopped by signal `number` after `step` steps; `exit_code` is the shell's, 128 + signal."""

    def __init__(self, recipe: Path, step: int, number: int) -> None:
        self.exit_code = 128 + number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}. To continue: agsm-rl train {recipe} --resume")
