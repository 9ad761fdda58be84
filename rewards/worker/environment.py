"""Environments of their own for packages that must not meet ours: made once by uv from a script and its lock.

The script's inline metadata (PEP 723) says what it needs; the lock beside it, made by `lock_script`, pins all of that
by version and hash, except torch and what torch itself pins (CUDA). Which build of torch fits is the machine's
business: it comes from where pip or uv are set up to find it.
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
"""Whom pip trusts; this has no say in what is installed."""


def cache_folder() -> Path:
    """Where environments are kept: AGSM_RL_CACHE, else agsm-rl in the user's cache folder."""
    own = os.environ.get("AGSM_RL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agsm-rl"


def find_uv(why: str) -> str:
    """The program uv; UserError that tells how to get it, and why it is wanted."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise UserError(
            f"{why} needs the program uv, which is not here; run `pip install 'agsm-rl[official-rewards]'`."
        )
    return found


@functools.cache
def _pip_settings() -> dict[str, str]:
    """What pip is set up to use, as uv's variables: uv reads none of pip's settings by itself."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found: dict[str, str] = {}
    for line in listing.stdout.splitlines() if listing.returncode == 0 else []:
        key, _, value = line.partition("=")
        name = (PIP_TO_UV | CERTIFICATES).get(key.rpartition(".")[2])
        if name is not None:
            found[name] = ",".join(str(ast.literal_eval(value)).split())
    return found


def uv_variables() -> dict[str, str]:
    """Additions to the environment of uv: pip's settings, where uv has none of its own."""
    return {name: value for name, value in _pip_settings().items() if name not in os.environ}


def script_metadata(script: Path) -> dict[str, Any] | None:
    """A script's inline metadata; None where it has none, UserError where it cannot be read."""
    try:
        found = _METADATA.search(script.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{script}: cannot be read: {error}") from error
    if found is None:
        return None
    text = "".join(line[2:] if line.startswith("# ") else line[1:] for line in found["content"].splitlines(True))
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{script}: its inline metadata is not TOML: {error}") from error


def python_for(script: Path) -> Path:
    """The Python of the environment that a locked script wants; made at the first call, which takes some minutes.

    UserError with uv's last lines when it cannot be made. Several processes may ask at once: one makes it.
    """
    lock = script.with_suffix(".lock")
    metadata = script_metadata(script)
    if metadata is None or not lock.is_file():
        raise UserError(f"{script}: it has no inline metadata, or no lock {lock.name} beside it")
    torch = [needed for needed in metadata["dependencies"] if _OF_TORCH.match(needed)]
    uv = find_uv(f"the environment of {script.stem}")
    sources = uv_variables()
    # Other sources may give another build of torch.
    places = [sources[name] for name in PIP_TO_UV.values() if name in sources]
    identity = [lock.read_text(), *torch, metadata["requires-python"], *places]
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
            print(f"agsm-rl: making the environment of {script.stem} in {folder}, once", file=sys.stderr)
            wanted = ["--python", metadata["requires-python"]]
            # Our own Python where it will do, else another that uv finds or fetches.
            _uv([uv, "venv", "--quiet", *wanted, str(folder)], sources, folder.parent)
            install = [uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(lock), *torch]
            _uv(install, sources, folder.parent)
            (folder / FINISHED).touch()
    return python


def lock_script(script: Path) -> str:
    """The text of the lock of a script, resolved anew: `name==version` with hashes, no addresses and no torch.

    Sources that pip or uv are set up with are left out, because a lock is for everybody.
    """
    clean = dict.fromkeys((*PIP_TO_UV.values(), "UV_INDEX", "UV_TORCH_BACKEND"))
    clean |= {name: value for name, value in uv_variables().items() if name in CERTIFICATES.values()}
    listing = ["--universal", "--generate-hashes", "--no-header", "--no-annotate", "--no-config"]
    text = _uv([find_uv("locking"), "pip", "compile", "--quiet", *listing, str(script)], clean, script.parent)
    entries = re.findall(r"^\S.*?(?=^\S|\Z)", text, re.S | re.M)
    return "".join(entry for entry in entries if not _OF_TORCH.match(entry))


def _uv(command: list[str], added: Mapping[str, str | None], folder: Path, *, text: str = "") -> str:
    """uv's output for `text` on stdin; UserError with its last lines when it fails.

    Run in `folder`, elsewhere than in the user's own project.
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
    # python -m agsm_rl_rewards.worker.environment SCRIPT...: write the scripts' locks anew.
    for name in sys.argv[1:]:
        Path(name).with_suffix(".lock").write_text(lock_script(Path(name).absolute()))
