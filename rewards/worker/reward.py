"""`worker`: your own reward with its own requirements, in a separate process.

    rewards: {mine: {use: worker, script: ./my_reward.py, weight: 1.0}}

A script that states its requirements inline (PEP 723) is run by `uv run`, any other by our Python; `command` runs
anything else, e.g. `[docker, run, -i, my-image]`. The other end is `serve` of agsm_rl_worker.py.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agsm_rl_rewards import worker_side
from agsm_rl_rewards.worker.environment import find_uv, script_metadata, uv_variables
from agsm_rl_rewards.worker.process import PipeLink
from agsm_rl_rewards.worker.remote import RemoteReward

from agsm_rl.errors import UserError
from agsm_rl.files import local_path

SIDE = str(Path(worker_side.__file__).parent)


class WorkerReward(RemoteReward):
    """Scores by your own script or command, in a separate process.

    Args:
        script: Python file of the reward; uv creates the environment that it states. Give this or `command`.
        command: The command that starts the worker, as a list of words. Give this or `script`.
        options: Constructor arguments of the reward in the worker.
    """

    def __init__(
        self,
        *,
        script: str | None = None,
        command: list[str] | None = None,
        options: dict[str, Any] | None = None,
        timeout: float = 120.0,
        start_timeout: float = 600.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        if (script is None) == (command is None) or command == []:
            raise UserError("reward 'worker': give it a `script`, or a `command` as a list of words, and not both")
        if script is not None and not local_path(script).is_file():
            raise UserError(f"reward 'worker': script: '{script}' does not exist (looked from {Path.cwd()})")
        super().__init__(
            PipeLink(prepare=lambda: _prepared(script, command)),
            name=Path(script or (command or [""])[0]).stem,
            options=options,
            timeout=timeout,
            start_timeout=start_timeout,
            retries=retries,
            backoff=backoff,
        )

    @staticmethod
    def permissions(options: Mapping[str, Any]) -> list[str]:
        """Running the script or command, which the command line must allow."""
        if options.get("script") is not None:
            return [f"command:{options['script']}"]
        return [f"command:{shlex.join(options['command'])}"] if options.get("command") else []


def side_path(*, keep: bool = False) -> dict[str, str | None]:
    """The environment in which a worker finds agsm_rl_worker.py; keep: in front of the present PYTHONPATH."""
    present = os.environ.get("PYTHONPATH") if keep else None
    path = os.pathsep.join([SIDE, present] if present else [SIDE])
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | _own_gpu()


def _own_gpu() -> dict[str, str | None]:
    """With several training processes on this machine, each one's workers use its GPU, which they see as "cuda"."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1:
        return {}
    rank, visible = int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {"CUDA_VISIBLE_DEVICES": str(rank)}
    listed = visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": listed[rank % len(listed)]}


def _prepared(script: str | None, command: Sequence[str] | None) -> tuple[Sequence[str], Mapping[str, str | None]]:
    if command is not None:
        return command, side_path(keep=True)
    path = local_path(script or "").absolute()
    if script_metadata(path) is None:
        return [sys.executable, str(path)], side_path(keep=True)
    uv = find_uv(f"{path.name}, which states its requirements,")
    # Without VIRTUAL_ENV, which is our own.
    return [uv, "run", "--quiet", "--no-project", "--script", str(path)], side_path() | uv_variables() | {
        "VIRTUAL_ENV": None
    }
