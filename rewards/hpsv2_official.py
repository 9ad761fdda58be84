"""HPSv2 and HPSv2.1 (arXiv 2306.09341) by the official package hpsv2 1.2.0, in a separate environment."""

from __future__ import annotations

from typing import get_args

from agsm_rl_rewards.hpsv2 import Version, check_version
from agsm_rl_rewards.official.locked import HERE, LockedScriptReward, existing

from agsm_rl.errors import unknown_name


class OfficialHPSv2(LockedScriptReward):
    """HPSv2 by the official package: scores [B] in [-1, 1]; images are sent in 8 bits per channel.

    Args:
        version: `"2.0"` or `"2.1"`, in quotes; their scores cannot be compared.
        path: The checkpoint HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, or a folder or hub id that contains it.
    """

    def __init__(
        self,
        *,
        version: Version,
        path: str = "xswu/HPSv2",
        timeout: float = 300.0,
        start_timeout: float = 600.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        name = "hpsv2_official"
        if version not in get_args(Version):
            raise unknown_name(f"reward '{name}': version", str(version), "a version (in quotes)", get_args(Version))
        check_version(path, version, reward=name)
        super().__init__(
            HERE / "hpsv2_worker.py",
            name=name,
            options={"version": version, "path": existing(path, reward=name, option="path")},
            timeout=timeout,
            start_timeout=start_timeout,
            retries=retries,
            backoff=backoff,
        )
