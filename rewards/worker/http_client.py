"""`http`: a reward that `agsm-rl serve-reward` serves, here or on another machine.

    rewards: {http: {url: "http://127.0.0.1:8765", weight: 1.0}}

The token is taken from the environment variable AGSM_RL_REWARD_TOKEN, so that no recipe holds it.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from agsm_rl_rewards.worker.remote import Fault, RemoteReward
from agsm_rl_rewards.worker_side.agsm_rl_worker import MAX_HEADER, Buffer, Frame, ProtocolError, decode

from agsm_rl.errors import UserError

FRAME = "application/x-agsm-rl-frame"
TOKEN_VARIABLE = "AGSM_RL_REWARD_TOKEN"
PASSING = {408, 429, 502, 503, 504}
"""Statuses after which the same request may succeed."""
ADVICE = {
    401: f"; set {TOKEN_VARIABLE} to the token that serve-reward told",
    413: "; score fewer images at once, or serve it with a larger --max-megabytes",
}


class HttpLink:
    """A connection a question; no proxies, no redirects: what goes to `url` goes nowhere else."""

    def __init__(self, url: SplitResult) -> None:
        self._url = url
        self.is_open = False

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False

    def last_words(self) -> str:
        return ""

    def ask(self, parts: Sequence[Buffer], *, timeout: float, max_body: int) -> Frame:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=timeout)
        late = threading.Event()

        def end() -> None:
            # The connection's own timeout begins anew with each byte.
            late.set()
            with contextlib.suppress(OSError, AttributeError):  # not connected yet, or no longer
                connection.sock.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(timeout, end)
        watch.daemon = True
        watch.start()
        try:
            status, content_type, body = self._exchange(connection, b"".join(parts), MAX_HEADER + max_body)
        except (OSError, http.client.HTTPException) as error:
            told = f"no answer within {timeout:.3g} s" if late.is_set() else f"{type(error).__name__}: {error}"
            raise Fault(f"{self._url.geturl()}: {told}") from error
        finally:
            watch.cancel()
            connection.close()
        return self._frame(status, content_type, body, max_body)

    def _exchange(self, connection: http.client.HTTPConnection, body: bytes, limit: int) -> tuple[int, str, bytes]:
        headers = {"Content-Type": FRAME, "Authorization": f"Bearer {os.environ.get(TOKEN_VARIABLE, '')}"}
        connection.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before the end: the answer says why
            connection.request("POST", f"{self._url.path.rstrip('/')}/frame", body, headers)
        response = connection.getresponse()
        found = response.read(limit + 1)
        if len(found) > limit:
            raise http.client.HTTPException(f"its answer is over the limit of {limit} bytes")
        return response.status, response.getheader("Content-Type", ""), found

    def _frame(self, status: int, content_type: str, body: bytes, max_body: int) -> Frame:
        if content_type == FRAME:
            try:
                return decode(body, max_body=max_body)
            except ProtocolError as error:
                raise Fault(f"{self._url.geturl()}: its answer is no frame: {error}") from error
        said = f"{self._url.geturl()}: status {status}: {_told(body)}"
        if status in PASSING:
            raise Fault(said, broken=False)
        raise UserError(f"reward 'http': {said}{ADVICE.get(status, '')}")


class HttpReward(RemoteReward):
    """Scores by a reward that is served over HTTP, by `agsm-rl serve-reward` or otherwise.

    Args:
        url: Address of the server, as `serve-reward` prints it. Images are sent as float32, 12 MB each at 1024 x 1024.
    """

    def __init__(
        self,
        *,
        url: str,
        timeout: float = 300.0,
        start_timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        super().__init__(
            HttpLink(parsed(url)),
            name="http",
            timeout=timeout,
            start_timeout=start_timeout,
            retries=retries,
            backoff=backoff,
        )

    @staticmethod
    def permissions(options: Mapping[str, Any]) -> list[str]:
        """Another machine must be allowed on the command line before a recipe may send it pictures."""
        host = parsed(str(options["url"])).hostname or ""
        return [] if is_loopback(host) else [f"host:{host}"]


def parsed(url: str) -> SplitResult:
    """The parts of a server's address; UserError for anything but http(s)://host[:port][/path]."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username is not None:
        raise UserError(f"reward 'http': url: '{url}' is no address of a server, such as http://127.0.0.1:8765")
    return parts


def is_loopback(host: str) -> bool:
    """Whether this name or address stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _told(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:200].decode(errors="replace")
