"""`http`: a reward that `agsm-rl serve-reward` serves, here or on another machine.

    rewards: {http: {url: "http://127.0.0.1:8765", weight: 1.0}}

The token comes from the environment variable AGSM_RL_REWARD_TOKEN, so that no recipe contains it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult

from agsm_rl_rewards.http_exchange import Answer, NoAnswer, is_loopback, parse_address, post
from agsm_rl_rewards.secret import secret_from, without, without_credentials
from agsm_rl_rewards.worker.remote import Fault, RemoteReward
from agsm_rl_rewards.worker_side.agsm_rl_worker import MAX_HEADER, Buffer, Frame, ProtocolError, decode

from agsm_rl.errors import UserError

FRAME = "application/x-agsm-rl-frame"
TOKEN_VARIABLE = "AGSM_RL_REWARD_TOKEN"
PASSING = {408, 429, 502, 503, 504}
"""Statuses after which the same request may succeed."""
ADVICE = {
    401: f"; set {TOKEN_VARIABLE} to the server's token, which serve-reward prints unless it was set there",
    413: "; score fewer images at once, or start serve-reward with a larger --max-megabytes",
}


class HttpLink:
    """One connection per question; no proxies, no redirects: what goes to `url` goes nowhere else."""

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
        token = secret_from(TOKEN_VARIABLE, who="reward 'http'")
        headers = {"Content-Type": FRAME, "Authorization": f"Bearer {token}"}
        address = self._url._replace(path=f"{self._url.path.rstrip('/')}/frame")
        try:
            answer = post(address, b"".join(parts), headers, timeout=timeout, limit=MAX_HEADER + max_body)
        except NoAnswer as error:
            raise Fault(f"{self._url.geturl()}: {error}") from error
        if answer.too_long:
            raise Fault(f"{self._url.geturl()}: its answer is over the limit of {MAX_HEADER + max_body} bytes")
        return self._frame(answer, max_body, token)

    def _frame(self, answer: Answer, max_body: int, token: str) -> Frame:
        if answer.headers.get("Content-Type", "") == FRAME:
            try:
                return decode(answer.body, max_body=max_body)
            except ProtocolError as error:
                raise Fault(f"{self._url.geturl()}: its answer is not a frame: {error}") from error
        reason = _reason(without(token, answer.body.decode(errors="replace")))
        said = f"{self._url.geturl()}: status {answer.status}: {reason}"
        if answer.status in PASSING:
            raise Fault(said, broken=False)
        raise UserError(f"reward 'http': {said}{ADVICE.get(answer.status, '')}")


class HttpReward(RemoteReward):
    """Scores by a reward that is served over HTTP, by `agsm-rl serve-reward` or any other server of its protocol.

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
        """Sending pictures to another machine, which the command line must allow."""
        host = parsed(str(options["url"])).hostname or ""
        return [] if is_loopback(host) else [f"host:{host}"]


def parsed(url: str) -> SplitResult:
    """The parts of a server's address; UserError for anything but http(s)://host[:port][/path]."""
    parts = parse_address(url)
    if parts is None:
        raise UserError(
            f"reward 'http': url: '{without_credentials(url)}' is not a server's address; give one like "
            "http://127.0.0.1:8765, without user, password or query"
        )
    return parts


def _reason(body: str) -> str:
    try:
        return str(json.loads(body)["error"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return " ".join(body[:200].split())
