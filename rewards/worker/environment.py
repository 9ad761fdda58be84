"""Separate environments for packages that conflict with ours, created once by uv from a script and its lock.

The script's inline metadata (PEP 723) lists its dependencies. The lock beside it, written by `lock_script`, pins them
by version and hash, except torch and the CUDA packages that torch itself pins: which build of torch fits depends on the
machine, so it comes from the package indexes that pip or uv are configured with.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from agsm_rl.errors import UserError

_METADATA = re.compile(r"^# /// script\n(?P<content>(?:#(?: .*)?\n)+?)# ///$", re.M)
_OF_TORCH = re.compile(r"^(torch|triton|nvidia-[\w.-]+|cuda-[\w.-]+)==")
FINISHED = "finished"
PIP_TO_UV = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX"}
CERTIFICATES = {"cert": "SSL_CERT_FILE"}
"""The certificates that pip trusts; they do not affect what is installed."""


def cache_folder() -> Path:
    """Where environments are stored: AGSM_RL_CACHE, else agsm-rl in the user's cache folder."""
    configured = os.environ.get("AGSM_RL_CACHE")
    return (
        Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agsm-rl"
    )


def find_uv(why: str) -> str:
    """The path of the program uv; UserError that says what needs it and how to install it."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        raise UserError(
            f"{why} needs the program uv, which is not installed; run `pip install 'agsm-rl[official-rewards]'`."
        )
    return uv


@functools.cache
def _pip_settings() -> dict[str, str]:
    """pip's configuration as environment variables for uv, which does not read pip's settings itself."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings: dict[str, str] = {}
    for line in listing.stdout.splitlines() if listing.returncode == 0 else []:
        key, _, value = line.partition("=")
        name = (PIP_TO_UV | CERTIFICATES).get(key.rpartition(".")[2])
        if name is not None:
            settings[name] = ",".join(str(ast.literal_eval(value)).split())
    return settings


def uv_variables() -> dict[str, str]:
    """Variables to add to uv's environment: pip's settings, unless the same is set for uv."""
    return {name: value for name, value in _pip_settings().items() if name not in os.environ}


def script_metadata(script: Path) -> dict[str, Any] | None:
    """A script's inline metadata; None if it has none, UserError if it cannot be read."""
    try:
        block = _METADATA.search(script.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{script}: cannot be read: {error}") from error
    if block is None:
        return None
    text = "".join(line[2:] if line.startswith("# ") else line[1:] for line in block["content"].splitlines(True))
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{script}: its inline metadata is not TOML: {error}") from error


def python_for(script: Path) -> Path:
    """The Python of a locked script's environment, which the first call creates in some minutes.

    UserError with uv's last lines if that fails. If several processes ask at once, one of them creates it.
    """
    lock = script.with_suffix(".lock")
    metadata = script_metadata(script)
    if metadata is None or not lock.is_file():
        raise UserError(f"{script}: has no inline metadata, or no lock {lock.name} beside it")
    torch = [dependency for dependency in metadata["dependencies"] if _OF_TORCH.match(dependency)]
    uv = find_uv(f"the environment of {script.stem}")
    sources = uv_variables()
    # Other indexes may give another build of torch.
    indexes = [sources[name] for name in PIP_TO_UV.values() if name in sources]
    identity = [lock.read_text(), *torch, metadata["requires-python"], *indexes]
    identity += [os.environ.get(name, "") for name in (*PIP_TO_UV.values(), "UV_TORCH_BACKEND")]
    folder = (
        cache_folder() / "environments" / f"{script.stem}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:12]}"
    )
    python = folder / "bin" / "python"
    if (folder / FINISHED).exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.in-work"):
        if not (folder / FINISHED).exists():
            shutil.rmtree(folder, ignore_errors=True)
            print(
                f"agsm-rl: creating the environment of {script.stem} in {folder}; this happens only once",
                file=sys.stderr,
            )
            # This Python if its version fits, otherwise another one that uv finds or downloads.
            version = ["--python", metadata["requires-python"]]
            _uv([uv, "venv", "--quiet", *version, str(folder)], sources, folder.parent)
            install = [uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(lock), *torch]
            _uv(install, sources, folder.parent)
            (folder / FINISHED).touch()
    return python


def lock_script(script: Path) -> str:
    """Resolve a script's dependencies and return its lock: `name==version` with hashes, without addresses or torch.

    The package indexes configured for pip or uv are ignored, because a lock must work for everybody.
    """
    clean = dict.fromkeys((*PIP_TO_UV.values(), "UV_INDEX", "UV_TORCH_BACKEND"))
    clean |= {name: value for name, value in uv_variables().items() if name in CERTIFICATES.values()}
    listing = ["--universal", "--generate-hashes", "--no-header", "--no-annotate", "--no-config"]
    text = _uv([find_uv("locking"), "pip", "compile", "--quiet", *listing, str(script)], clean, script.parent)
    entries = re.findall(r"^\S.*?(?=^\S|\Z)", text, re.S | re.M)
    return "".join(entry for entry in entries if not _OF_TORCH.match(entry))


def _uv(command: list[str], added: Mapping[str, str | None], folder: Path, *, text: str = "") -> str:
    """Run uv with `text` on stdin and return its output; UserError with its last lines if it fails.

    It runs in `folder` so that the user's project does not affect it.
    """
    environment = {key: value for key, value in (os.environ | added).items() if value is not None}
    for name in ("VIRTUAL_ENV", "PYTHONPATH"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, input=text, capture_output=True, text=True, check=True
        )
    except subprocess.CalledProcessError as error:
        words = " | ".join(line.strip() for line in error.stderr.strip().splitlines()[-4:])
        raise UserError(f"`{shlex.join(command[:3])} …` failed: {words}") from error
    return done.stdout


if __name__ == "__main__":
    # python -m agsm_rl_rewards.worker.environment SCRIPT...: rewrite the locks of these scripts.
    for name in sys.argv[1:]:
        Path(name).with_suffix(".lock").write_text(lock_script(Path(name).absolute()))
