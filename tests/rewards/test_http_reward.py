"""A reward over HTTP: the same scores as here, and what its client says of servers that fail."""

import http.client
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
import torch
from agsm_rl_rewards.functions import as_reward
from agsm_rl_rewards.jpeg import JpegCompressibility
from agsm_rl_rewards.sharpness import Sharpness
from agsm_rl_rewards.worker.http_client import FRAME, TOKEN_VARIABLE, HttpReward
from agsm_rl_rewards.worker.http_server import listen
from http_serving import QUICK, Settable

from agsm_rl.errors import UserError


@pytest.mark.parametrize("reward", [Sharpness(), JpegCompressibility()])
def test_scores_over_http_are_the_scores_here(serve, reward):
    images = torch.rand(5, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    there = HttpReward(url=serve(reward), **QUICK)
    assert torch.equal(there(images, ["a"] * 5), reward(images, ["a"] * 5))
    assert there.range == reward.range


def test_the_prompts_other_columns_go_over_http_to_a_reward_that_takes_them(serve):
    def starred(images, prompts, metadata):
        return [row["stars"] for row in metadata]

    there = HttpReward(url=serve(as_reward(starred)), **QUICK)
    rows = [{"stars": 2.0, "prompt": "ü"}, {"stars": 0.5}]
    assert there(torch.zeros(2, 3, 4, 4), ["a", "b"], rows).tolist() == [2.0, 0.5]


def test_a_wrong_token_is_told_by_the_client_at_once(serve, monkeypatch):
    url = serve(Sharpness())
    monkeypatch.setenv(TOKEN_VARIABLE, "old")
    with pytest.raises(UserError, match=f"status 401.*set {TOKEN_VARIABLE}"):
        HttpReward(url=url, retries=50, backoff=60.0)(torch.zeros(1, 3, 2, 2), [""])


def test_a_batch_that_is_too_large_is_told_at_once(serve, monkeypatch):
    url, images = serve(Sharpness(), body=20_000), torch.zeros(16, 3, 256, 256)
    client = HttpReward(url=url, retries=50, backoff=60.0)
    with pytest.raises(UserError, match="status 413: .*over the limit.*; score fewer images at once"):
        client(images, [""] * 16)
    request = http.client.HTTPConnection.request

    def cut_off(*arguments):  # as by a server that does not wait for the end
        request(*arguments)
        raise BrokenPipeError

    monkeypatch.setattr(http.client.HTTPConnection, "request", cut_off)
    with pytest.raises(UserError, match="status 413"):
        client(images, [""] * 16)


def test_a_connection_that_cannot_be_made_is_told_as_that(monkeypatch):
    def reset(*arguments, **options):
        raise ConnectionResetError(104, "reset at once")

    monkeypatch.setattr(socket, "create_connection", reset)
    with pytest.raises(UserError, match="no scores after 2 tries; at last: .*reset at once"):
        HttpReward(url="http://127.0.0.1:1", **QUICK)(torch.ones(1, 3, 2, 2), [""])


def test_a_server_that_is_busy_at_the_greeting_is_greeted_again(serve):
    client = HttpReward(url=serve(Sharpness(), waiting=0), **QUICK)
    with pytest.raises(UserError, match="no scores after 2 tries; at last: .*status 503"):
        client(torch.ones(1, 3, 4, 4), [""])
    client._link._url = urlsplit(serve(Sharpness()))
    assert client(torch.ones(1, 3, 4, 4), [""]).shape == (1,)
    assert client.range == Sharpness.range  # what a greeting tells


def test_a_passing_failure_of_the_reward_is_tried_again_and_a_lasting_one_told(serve):
    reward, failures = Settable(), [ValueError("no luck")]

    def act(images, prompts):
        if failures:
            raise failures.pop()
        return images[:, 0, 0, 0]

    reward.act = act
    client = HttpReward(url=serve(reward), **QUICK)
    assert client(torch.ones(1, 3, 2, 2), [""]).tolist() == [1.0]
    failures += [ValueError("never")] * 2
    with pytest.raises(UserError, match="no scores after 2 tries; at last: ValueError: never"):
        client(torch.ones(1, 3, 2, 2), [""])


def test_a_mistake_that_the_reward_names_is_told_at_once(serve):
    reward = Settable()

    def act(images, prompts):
        raise UserError("no prompt of the shapes world")

    reward.act = act
    with pytest.raises(UserError, match="reward 'http': no prompt of the shapes world"):
        HttpReward(url=serve(reward), retries=50, backoff=60.0)(torch.ones(1, 3, 2, 2), [""])


def test_a_server_that_is_not_there_is_told_after_the_tries(monkeypatch):
    free = listen("127.0.0.1", 0)
    port = free.getsockname()[1]
    free.close()
    with pytest.raises(UserError, match=rf"no scores after 2 tries; at last: http://127.0.0.1:{port}: Connection"):
        HttpReward(url=f"http://127.0.0.1:{port}", **QUICK)(torch.ones(1, 3, 2, 2), [""])


def read_request(connection):
    """All of a request with a body; a connection closed with bytes unread is reset, and its answer may be lost."""
    with connection.makefile("rb") as stream:
        head = iter(stream.readline, b"\r\n")
        sizes = [int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length:")]
        stream.read(sum(sizes))


def answering(reply, drip=0.0):
    """A server of another kind: it sends these bytes to all; gives its address."""
    listening = listen("127.0.0.1", 0)

    def run():
        while True:
            connection, _ = listening.accept()
            with connection:
                read_request(connection)
                try:
                    for byte in [bytes([one]) for one in reply] if drip else [reply]:
                        connection.sendall(byte)
                        time.sleep(drip)
                except OSError:
                    pass

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


OTHERS = {
    "not_http": (b"SSH-2.0\r\n", "BadStatusLine"),
    "page": (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<h1>", "status 200: <h1>"),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n", "status 302"),
    "cut": (f"HTTP/1.1 200 OK\r\nContent-Type: {FRAME}\r\nContent-Length: 50\r\n\r\nAGRW".encode(), "Incomplete|frame"),
    "nonsense": (f"HTTP/1.1 200 OK\r\nContent-Type: {FRAME}\r\nContent-Length: 4\r\n\r\nAGRW".encode(), "not a frame"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_answers_of_other_servers_are_named(name):
    reply, reason = OTHERS[name]
    with pytest.raises(UserError, match=reason):
        HttpReward(url=answering(reply), **QUICK)(torch.ones(1, 3, 2, 2), [""])


def test_a_server_that_drips_is_cut_off_at_the_time_limit():
    url = answering(b"HTTP/1.1 200 OK\r\n" + b"x" * 200, drip=0.05)
    begin = time.monotonic()
    with pytest.raises(UserError, match="timed out after 0.4"):
        HttpReward(url=url, start_timeout=0.4, retries=0)(torch.ones(1, 3, 2, 2), [""])
    assert time.monotonic() - begin < 9  # dripping takes ten seconds


@pytest.mark.parametrize(
    "url", ["ftp://x", "127.0.0.1:80", "http://", "http://u:p@x/", "http://x/?a=1", "http://x:99999"]
)
def test_what_is_no_address_is_told(url):
    with pytest.raises(UserError, match="is not a server's address"):
        HttpReward(url=url)
