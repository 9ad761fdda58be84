"""The command `serve-reward`: a reward made from its name and options, served over HTTP until the process ends."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Collection, Iterable
from typing import Annotated, Any

import typer

from agsm_rl.cli.options import AllowOption
from agsm_rl.errors import UserError
from agsm_rl.run.screen import say


def serve_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward: see `agsm-rl list rewards`.")],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="An option of the reward, e.g. version='\"2.1\"'. Repeatable."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but loopback needs a token that you set.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8765,
    max_megabytes: Annotated[int, typer.Option(min=1, help="The largest request that is accepted.")] = 256,
    allow_import: AllowOption = None,
) -> None:
    """Serve a reward over HTTP, for `rewards: {http: {url: …}}` here or elsewhere.

    Clients present a token: the one in AGSM_RL_REWARD_TOKEN, or else one that is made and printed.
    """
    serve(name, options or [], host=host, port=port, max_bytes=max_megabytes * 2**20, allow_imports=allow_import or [])


def serve(
    name: str, options: Iterable[str], *, host: str, port: int, max_bytes: int, allow_imports: Collection[str] = ()
) -> None:
    """Serve until a signal ends it; `options` are `key=value` texts. UserError if it cannot be served."""
    from agsm_rl_rewards.http_exchange import is_loopback
    from agsm_rl_rewards.secret import secret_from
    from agsm_rl_rewards.worker.http_client import TOKEN_VARIABLE

    missing = [package for package in ("starlette", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"serve-reward needs {missing[0]}, which is not installed; run `pip install 'agsm-rl[serve]'`")
    token = secret_from(TOKEN_VARIABLE, who="serve-reward")
    if not token and TOKEN_VARIABLE in os.environ:
        raise UserError(f"serve-reward: {TOKEN_VARIABLE} is empty; set it to a secret, or unset it to have one made")
    if not token and not is_loopback(host):
        raise UserError(
            f"serve-reward: to listen on {host}, where other machines can reach it, set {TOKEN_VARIABLE} to a secret"
        )
    from agsm_rl_rewards.worker.http_server import FrameServer, Limits, listen

    reward = make_reward(name, options, allow_imports=allow_imports)
    server = FrameServer(reward, token=token or secrets.token_urlsafe(), limits=Limits(body=max_bytes))
    listening = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    say(f"{reward.name}: http://{shown}:{listening.getsockname()[1]}")
    if not token:
        say(f"{TOKEN_VARIABLE}={server.token.decode()}")
    server.uvicorn().run(sockets=[listening])


def make_reward(name: str, options: Iterable[str], *, allow_imports: Collection[str] = ()) -> Any:
    """The reward of that name; its options are checked like a recipe's."""
    from agsm_rl_rewards.functions import as_reward

    from agsm_rl.interfaces import Reward
    from agsm_rl.recipe.options import validated
    from agsm_rl.recipe.parts import Parts
    from agsm_rl.recipe.yaml_file import apply_overrides
    from agsm_rl.training.defaults import with_defaults

    texts: dict[str, Any] = {}
    apply_overrides(texts, options)
    parts = Parts(where="serve-reward", allow_imports=allow_imports)
    kind = parts.load("rewards", name, "NAME")
    # The user's own command line says what to run, so nothing more has to be allowed.
    made = parts.call(kind, validated(kind, texts, where="serve-reward: --option"), name)
    return with_defaults(as_reward(made), Reward)
