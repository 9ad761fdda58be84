"""What a launcher (accelerate launch, torchrun) tells a process about itself; nothing heavy is imported."""

import os
import time

PATIENCE = 10.0
"""Seconds that the other processes of a machine leave to its first one to tell a mistake that all of them found."""


def is_first() -> bool:
    """Whether this is the run's first process; a process that no launcher started is."""
    return os.environ.get("RANK", "0") == "0"


def let_the_first_speak() -> None:
    """Wait in a machine's other processes: when the first one tells the mistake and ends, the launcher ends them.

    Where the first one is well, each tells its own mistake after the wait.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)
