"""Ray for pools and sweeps: the running cluster at an address, or a new one on this machine only."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agsm_rl_rewards.worker.watchdog import watch_process

from agsm_rl.errors import UserError

QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}
LOCAL_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0, it puts Ray on the loopback address, as by default on macOS; `_node_ip_address` alone does not on Linux."""
OURS = (signal.SIGINT, signal.SIGTERM)
"""Signals that end a run with a checkpoint; Ray would abort the process."""
SIGACTION_BYTES = 512
"""More than any platform's struct sigaction takes."""


def import_ray(who: str) -> Any:
    """The package; UserError on behalf of `who` if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UserError(f"{who} needs Ray, which is not installed; run `pip install 'agsm-rl[ray]'`") from error
    return ray


class _NoFolders(list[str]):
    """Folders that Ray's workers import from beside Python's own: none, where Ray would add the current folder."""

    def extend(self, folders: Iterable[str]) -> None:
        """Add nothing."""


def _job_config(ray: Any) -> Any:
    """A job whose workers do not import from the current folder: a module beside a stranger's recipe would run."""
    config = ray.job_config.JobConfig()
    config._py_driver_sys_path = _NoFolders()
    return config


def start_ray(address: str | None = None, *, who: str) -> None:
    """Join the Ray at `address` or RAY_ADDRESS, or start one here that listens on loopback only and asks for a token.

    Workers import nothing from the current folder. Ray's usage reports, dashboard and handling of SIGTERM are off.
    Raises UserError if it cannot be reached or started, or if it would listen on another address.
    """
    ray = import_ray(who)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _signals_kept():
            if address is None and not os.environ.get("RAY_ADDRESS"):
                _start_here(ray, who)
            else:
                ray.init(address=address, job_config=_job_config(ray), **QUIET)
    except UserError:
        raise
    except Exception as error:  # Ray raises plain Exception when it is slow to start
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"{who}: Ray cannot be started or reached: {reason}") from error


def _start_here(ray: Any, who: str) -> None:
    from ray._private import ray_constants

    # Whoever reaches Ray's ports can run code as us, and every user of this machine reaches loopback: Ray asks for a
    # token, which it would otherwise write to the home folder.
    if not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[LOCAL_ONLY], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # read at import, which may have been before
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            job_config=_job_config(ray),
            _node_ip_address="127.0.0.1",
            **QUIET,
        )
    finally:
        del os.environ[LOCAL_ONLY]
        ray_constants.ENABLE_RAY_CLUSTER = before
    listens_on = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(listens_on).is_loopback:
        ray.shutdown()
        raise UserError(
            f"{who}: Ray {ray.__version__} would listen on {listens_on}, where other machines can reach it. Start Ray "
            "yourself and give its `address`, or install a version of Ray that keeps to loopback (2.60 does)"
        )
    _end_agents_with_us(ray)


def _end_agents_with_us(ray: Any) -> None:
    """Have the raylet's children ended when we are killed: its agents would notice only after a minute or two."""
    with contextlib.suppress(AttributeError, OSError):  # private names; and only Linux lists children so
        for processes in ray._private.worker._global_node.all_processes.values():
            for raylet in [item.process.pid for item in processes]:
                children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text(encoding="ascii")
                for child in children.split():
                    watch_process(int(child))


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the handlers of OURS after Ray has started; Ray replaces them in Python and in C, in any thread."""
    in_python = {number: signal.getsignal(number) for number in OURS}
    in_c = {number: ctypes.create_string_buffer(SIGACTION_BYTES) for number in OURS}
    libc = ctypes.CDLL(None)
    for number, action in in_c.items():
        libc.sigaction(int(number), None, action)
    try:
        yield
    finally:
        for number, action in in_c.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, in_python[number])
            libc.sigaction(int(number), action, None)
