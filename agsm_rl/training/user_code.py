"""Calling the user's own code, such as a reward: its failures are reported, and it cannot end the run as a success."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from agsm_rl.errors import UserError

_running: list[tuple[int, str]] = []
"""Who is being called at the moment, in any thread, and in which process: a forked child may exit as it likes."""
_exit = os._exit


@contextmanager
def user_code(who: str, about: str) -> Iterator[None]:
    """Around a call of `who`: whatever it raises, sys.exit() too, becomes a UserError that names it and the place.

    `about` says what it was called with. Gradients are switched on or off afterwards as before. os._exit(), which
    nothing can catch, ends the process with exit code 2 at least.
    """
    os._exit = _exit_with_an_error
    call = (os.getpid(), who)
    _running.append(call)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise UserError(f"{who}: it called sys.exit({error.code!r}) instead of returning scores, {about}") from error
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"in {frames[-1].name}, {Path(frames[-1].filename).name} line {frames[-1].lineno}"
        raise UserError(f"{who}: it failed with {type(error).__name__}: {error} ({place}), {about}") from error
    finally:
        _running.remove(call)


def _exit_with_an_error(status: int) -> NoReturn:
    """In place of os._exit, which would end a run in the middle with the exit code of a finished one."""
    if who := [name for process, name in _running if process == os.getpid()]:
        print(f"agsm-rl: {who[-1]}: it ended the process with os._exit({status})", file=sys.stderr, flush=True)
        _exit(status or 2)
    _exit(status)
