"""What ends a run before its last step, in words that name the newest good checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.run import checkpoints
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.stop import Lost
from agsm_rl.trainer import Trainer
from agsm_rl.training.processes import GRACE, EndWhenStuck, ProcessLost


@contextmanager
def failures_named(folder: RunFolder, trainer: Trainer) -> Iterator[None]:
    """Within the block, a lost process ends the run as Lost; a disk that refuses, or sys.exit(), as a UserError."""
    try:
        yield
    except ProcessLost as error:
        raise lost(folder, trainer, f"another process ended, or {error}") from error
    except SystemExit as error:
        message = f"{folder.path}: the run ended after step {trainer.step}, because code that it uses called sys.exit()"
        raise UserError(f"{message}. {_advice(folder)}") from error
    except OSError as error:
        raise UserError(
            f"{folder.path}: the run ended after step {trainer.step}: {error}. {_advice(folder)}"
        ) from error


def _advice(folder: RunFolder) -> str:
    """How to continue once the cause is gone."""
    good = checkpoints.newest_good(folder.checkpoints)
    if good is None:
        return f"There is no checkpoint in {folder.checkpoints}; fix the cause, then start again."
    return f"The newest good checkpoint is {good}; fix the cause, then resume with {folder.resume_command}."


def lost(folder: RunFolder, trainer: Trainer, cause: str) -> Lost:
    """The end of this process because another is gone; two per machine say so, as one of them may be what was lost."""
    return Lost(
        folder.resume_command,
        trainer.step,
        str(trainer.processes),
        cause,
        checkpoint=checkpoints.newest_good(folder.checkpoints),
        prints=trainer.accelerator.local_process_index < 2,
    )


def ended_when_stuck(folder: RunFolder, trainer: Trainer) -> AbstractContextManager[Any]:
    """With several processes: one that still waits for another long after a signal prints why, and ends."""
    if trainer.processes.count == 1:
        return nullcontext()

    def message(number: int) -> str | None:
        name = signal.Signals(number).name
        ending = lost(
            folder,
            trainer,
            f"{GRACE:.0f} s after {name} its step has not ended, so it waits for a process that is gone (or its steps "
            "take longer than a launcher waits)",
        )
        return str(ending) if ending.prints else None

    return EndWhenStuck(message)
