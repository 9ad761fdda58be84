"""A reward whose official package runs in the environment that one of our locked scripts pins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agsm_rl_rewards.worker.environment import python_for
from agsm_rl_rewards.worker.process import PipeLink
from agsm_rl_rewards.worker.remote import RemoteReward
from agsm_rl_rewards.worker.reward import side_path

from agsm_rl.errors import UserError
from agsm_rl.files import local_path

HERE = Path(__file__).parent


class LockedScriptReward(RemoteReward):
    """A RemoteReward by `script`, started in the environment that `locked` (by default `script`) pins.

    The environment is created at the first batch (uv, PyPI, 1.2 GB or more); start_timeout begins after that.
    """

    def __init__(
        self, script: Path, *, locked: Path | None = None, name: str, options: dict[str, Any], **how: Any
    ) -> None:
        def prepare() -> tuple[list[str], dict[str, str | None]]:
            return [str(python_for(locked or script)), str(script)], side_path() | {"VIRTUAL_ENV": None}

        super().__init__(PipeLink(prepare=prepare), name=name, options=options, **how)


def existing(path: str | None, *, reward: str, option: str) -> str | None:
    """The absolute path, as the worker will open it; hub ids stay as they are; UserError if a path does not exist."""
    if path is None:
        return None
    local = local_path(path)
    if local.exists():
        return str(local.absolute())
    if path.count("/") == 1 and not path.startswith((".", "~", "/")) and not local.suffix:
        return path
    raise UserError(
        f"reward '{reward}': {option}: '{path}' does not exist (current folder: {Path.cwd()}) and is not a hub id"
    )
