"""The command `serve-reward`: a reward made from its name and options, behind HTTP until the process is ended."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Collection, Iterable
from typing import Any

from agsm_rl_rewards.worker.http_client import TOKEN_VARIABLE, is_loopback

from agsm_rl.errors import UserError
from agsm_rl.recipe.options import validated
from agsm_rl.recipe.resolve import Parts
from agsm_rl.recipe.yaml_file import apply_overrides


def serve(
    name: str, options: Iterable[str], *, host: str, port: int, max_bytes: int, allow_imports: Collection[str] = ()
) -> None:
    """Serve until a signal ends it. `options` are `key=value` texts; UserError for what cannot be served."""
    missing = [package for package in ("starlette", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"serve-reward needs {missing[0]}, which is not here; run `pip install 'agsm-rl[serve]'`")
    token = os.environ.get(TOKEN_VARIABLE)
    if token is None and not is_loopback(host):
        raise UserError(
            f"serve-reward: to listen on {host}, where others can reach it, set {TOKEN_VARIABLE} to a secret"
        )
    from agsm_rl_rewards.worker.http_server import FrameServer, Limits, listen

    reward = make_reward(name, options, allow_imports=allow_imports)
    server = FrameServer(
        reward, token=secrets.token_urlsafe() if token is None else token, limits=Limits(body=max_bytes)
    )
    listening = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"{reward.name}: http://{shown}:{listening.getsockname()[1]}", flush=True)
    if token is None:
        print(f"{TOKEN_VARIABLE}={server.token.decode()}", flush=True)
    server.uvicorn().run(sockets=[listening])


def make_reward(name: str, options: Iterable[str], *, allow_imports: Collection[str] = ()) -> Any:
    """The reward of that name; its options are checked as a recipe's are."""
    given: dict[str, Any] = {}
    apply_overrides(given, options)
    parts = Parts(where="serve-reward", allow_imports=allow_imports)
    found = parts.load("rewards", name, "NAME")
    # The user's own command line says what to run, so that nothing more has to be allowed.
    return parts.call(found, validated(found, given, where="serve-reward: --option"), name)
