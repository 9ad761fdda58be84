"""Ray, where it is wanted: the cluster that there is, or one on this machine alone."""

from __future__ import annotations

import logging
import os
from typing import Any

from agsm_rl.errors import UserError


def import_ray(who: str) -> Any:
    """The package; UserError, told as `who`'s, where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UserError(f"{who} needs Ray, which is not here; run `pip install 'agsm-rl[ray]'`") from error
    return ray


def start_ray(address: str | None = None, *, who: str) -> None:
    """Join the Ray at `address` or RAY_ADDRESS, or start one here, which listens on loopback only.

    UserError when it cannot be reached or started. Ray's reports of its use to its makers are off.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None and not os.environ.get("RAY_ADDRESS"):
        how |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        how["address"] = address
    try:
        import_ray(who).init(**how)
    except Exception as error:  # Ray raises plain Exception when it is slow to start
        raise UserError(f"{who}: Ray cannot be started or reached: {error}") from error
