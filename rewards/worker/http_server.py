"""A reward served over HTTP: `POST /frame` takes and returns the worker's frames, `GET /health` says that it runs.

Every frame needs the token (`Authorization: Bearer …`). Each refusal has its own status: 400 not a frame, 401 token,
408 slow, 413 large, 415 compressed, 422 refused by the reward, 500 failed in the reward, 503 busy, 504 the reward takes
too long. Errors before the reward are JSON, {"error": …}; the others are frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import uvicorn
from agsm_rl_rewards.worker.http_client import FRAME
from agsm_rl_rewards.worker.served import Served
from agsm_rl_rewards.worker_side.agsm_rl_worker import PROTOCOL, Endpoint, ProtocolError, decode
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from agsm_rl.errors import UserError

MAX_CONNECTIONS = 64
CLOSE = {"connection": "close"}
"""In every answer, so that each request has to be as quick as the first."""
STATUS = {"hello": 200, "scores": 200, "refused": 422, "error": 500}


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request. read: seconds for its head, and again for its body. score: seconds for an answer.

    waiting: requests that are read or scored at the same time; they are scored one after another.
    """

    body: int = 256 * 2**20
    read: float = 30.0
    score: float = 300.0
    waiting: int = 8


class FrameServer:
    """The application and its server. `token` is what clients must present."""

    def __init__(self, reward: Any, *, token: str, limits: Limits | None = None) -> None:
        if not token:
            raise UserError("serve-reward: the token is empty")
        self.limits, self.token, self.name = limits or Limits(), token.encode(), reward.name
        self.endpoint = Endpoint(lambda: None)
        # Made in advance: clients that greeted an earlier server need not greet again.
        self.endpoint.reward = Served(reward)
        self.one_at_a_time, self.decoding = anyio.CapacityLimiter(1), anyio.CapacityLimiter(2)
        self.waiting = 0
        routes = [Route("/health", self.health), Route("/frame", self.frame, methods=["POST"])]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _as_json})

    def uvicorn(self) -> uvicorn.Server:
        """The server, to be run on a socket of `listen`."""
        read = self.limits.read

        class Timed(_TimedProtocol):
            seconds = read

        config = uvicorn.Config(
            self.app,
            http=Timed,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_level="error",  # malformed requests are answered, not logged
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        return uvicorn.Server(config)

    async def health(self, request: Request) -> Response:
        """For monitoring; reveals nothing that requires the token."""
        return JSONResponse({"protocol": PROTOCOL, "reward": self.name}, headers=CLOSE)

    async def frame(self, request: Request) -> Response:
        """Check the request and let the reward answer."""
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), self.token):
            raise HTTPException(401, "the token is missing or wrong: Authorization: Bearer …")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "compressed bodies are not taken")
        async with self._place():
            body = await self._body(request)
            try:
                question = await anyio.to_thread.run_sync(
                    lambda: decode(body, max_body=self.limits.body), limiter=self.decoding
                )
                if question.header["op"] not in ("hello", "score"):
                    raise ProtocolError("its op is not hello or score")
            except ProtocolError as error:
                raise HTTPException(400, f"not a frame: {error}") from error
            answer = b"".join(await self._answer(question))
        return Response(answer, STATUS[decode(answer).header["op"]], media_type=FRAME, headers=CLOSE)

    async def _answer(self, question: Any) -> Any:
        """The reward's answer; one that hangs keeps its thread, and later requests get 504."""
        work = anyio.to_thread.run_sync(
            self.endpoint.answer, question, abandon_on_cancel=True, limiter=self.one_at_a_time
        )
        try:
            return await asyncio.wait_for(work, self.limits.score)
        except TimeoutError as error:
            raise HTTPException(504, f"the reward took more than {self.limits.score:g} s") from error

    async def _body(self, request: Request) -> bytearray:
        limit, body = self.limits.body, bytearray()
        reason = f"the body is over the limit of {limit} bytes"
        over = int(request.headers.get("content-length", 0)) > limit
        if over and "expect" in request.headers:  # its sender waits for an answer first
            raise HTTPException(413, reason)
        try:
            async with asyncio.timeout(self.limits.read):
                # Too large a body is read and dropped: a client that is cut off while sending may never read why.
                async for part in request.stream():
                    over = over or len(body) + len(part) > limit
                    if over:
                        body.clear()
                    else:
                        body += part
        except ClientDisconnect as error:
            raise HTTPException(400, "the client is gone") from error
        except TimeoutError as error:
            if not over:
                raise HTTPException(408, f"the body took more than {self.limits.read:g} s") from error
        if over:
            raise HTTPException(413, reason)
        return body

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self.waiting >= self.limits.waiting:
            raise HTTPException(503, "too many requests at once; try again")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1


class _TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit: uvicorn waits forever for the head of a request."""

    seconds = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(self.seconds, self._end_if_silent)

    def _end_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; UserError if the address cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise UserError(f"serve-reward: cannot listen on {host} port {port}: {error}") from error


async def _as_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=CLOSE)
