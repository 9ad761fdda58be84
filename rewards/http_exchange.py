"""One HTTP request, for rewards that ask a server: one deadline for all of it, and a limit to the answer's size.

The socket timeouts of the usual libraries begin anew with every byte, so that a server that drips is waited for for
ever. Redirects are not followed: what is sent to an address goes nowhere else.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from agsm_rl_rewards.secret import without_credentials

from agsm_rl.errors import UserError

CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
"""Variables that name the certificates to trust, first come first served; certifi's otherwise."""


class NoAnswer(Exception):
    """There was no complete answer in time; the message says why, without the address."""


@dataclass(frozen=True)
class Answer:
    """A server's answer; `too_long`: `body` is only its beginning."""

    status: int
    headers: Message
    body: bytes
    too_long: bool = False

    @property
    def says_its_length(self) -> bool:
        """Whether an answer that is cut off would have been noticed; else it ends where the connection does."""
        return "Content-Length" in self.headers or "Transfer-Encoding" in self.headers


def parse_address(url: str) -> SplitResult | None:
    """The parts of http(s)://host[:port][/path]; None for anything else, or with a user, a query or a fragment."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    odd = parts.query or parts.fragment or "@" in parts.netloc or not url.isprintable() or not url.isascii()
    return parts if good and not odd and " " not in url and "%" not in parts.netloc else None


def is_loopback(host: str) -> bool:
    """Whether this name or address stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def post(
    address: SplitResult, body: bytes, headers: Mapping[str, str], *, timeout: float, limit: int, proxies: bool = False
) -> Answer:
    """The answer to one POST, of which at most `limit` bytes are read; NoAnswer unless it is complete in `timeout` s.

    proxies: use the proxy that the environment names for this address (https_proxy, no_proxy, …).
    """
    connection, target, extra = _connection(address, timeout, proxies=proxies)
    late, connected = threading.Event(), []

    def end() -> None:
        late.set()
        # The connection forgets its socket once it has read the head of an answer without a length.
        for sock in [*connected, connection.sock]:
            with contextlib.suppress(OSError, TypeError):  # closed, or not connected yet
                # Not SSLSocket's own method, which pulls the rug from under a thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    watch = threading.Timer(timeout, end)
    watch.daemon = True
    watch.start()
    try:
        connection.connect()
        connected.append(connection.sock)
        if late.is_set():
            raise TimeoutError
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before the end: the answer says why
            connection.request("POST", target, body, {**headers, **extra})
        response = connection.getresponse()
        content = response.read(limit + 1)
        if late.is_set() or (response.length and len(content) <= limit):
            raise http.client.IncompleteRead(content, response.length)
        answer = Answer(response.status, response.headers, content[:limit], too_long=len(content) > limit)
        if answer.status == 200 and not content and not answer.says_its_length:
            raise http.client.IncompleteRead(content)
        return answer
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        timed_out = late.is_set() or isinstance(error, TimeoutError)
        raise NoAnswer(f"timed out after {timeout:.3g} s" if timed_out else _reason(error)) from error
    finally:
        watch.cancel()
        connection.close()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


class _HTTPSConnection(http.client.HTTPSConnection):
    """Whose TLS handshake happens on the socket that the deadline can shut."""

    def __init__(self, host: str, port: int | None, timeout: float, name: str) -> None:
        file = next((os.environ[variable] for variable in CERTIFICATES if os.environ.get(variable)), None)
        if file is None:
            with contextlib.suppress(ImportError):
                import certifi

                file = certifi.where()
        folder = file if file is not None and os.path.isdir(file) else None
        self._trusted = ssl.create_default_context(cafile=None if folder else file, capath=folder)
        super().__init__(host, port, timeout=timeout, context=self._trusted)
        self._name = name

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._trusted.wrap_socket(self.sock, server_hostname=self._name, do_handshake_on_connect=False)
        self.sock.do_handshake()


def _connection(address: SplitResult, timeout: float, *, proxies: bool) -> tuple[Any, str, dict[str, str]]:
    """What connects to the address or its proxy; the request's target; headers for the proxy."""
    host, port = address.hostname or "", address.port
    target = address.path or "/"
    named = getproxies().get(address.scheme) or getproxies().get("all") if proxies and not proxy_bypass(host) else None
    if not named:
        if address.scheme == "https":
            return _HTTPSConnection(host, port, timeout, host), target, {}
        return http.client.HTTPConnection(host, port, timeout=timeout), target, {}
    proxy = urlsplit(named if "//" in named else f"http://{named}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise UserError(
            f"the environment names the proxy {without_credentials(named)}, but only http:// proxies can be used; set "
            f"another, or add {host} to no_proxy"
        )
    user = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}"
    login = {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if proxy.username else {}
    if address.scheme == "https":
        connection = _HTTPSConnection(proxy.hostname, proxy.port or 80, timeout, host)
        connection.set_tunnel(host, port or 443, login)
        return connection, target, {}
    connection = http.client.HTTPConnection(proxy.hostname, proxy.port or 80, timeout=timeout)
    return connection, f"http://{address.netloc}{target}", login
