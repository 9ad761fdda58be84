"""Calling the user's own code, such as a reward: its failures are reported, and it cannot end the run as a success."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from agsm_rl.errors import UserError


@contextmanager
def user_code(who: str, about: str) -> Iterator[None]:
    """Around a call of `who`: whatever it raises, sys.exit() too, becomes a UserError that names it and the place.

    `about` says what it was called with. Gradients are switched on or off afterwards as before. Only
    os._exit(), a deliberate kill of the process, passes; like any kill it leaves a run folder that can be resumed.
    """
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
