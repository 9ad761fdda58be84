"""What a served reward answers: who has no token or sends nonsense gets a status and nothing else."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agsm_rl_rewards.jpeg import JpegCompressibility
from agsm_rl_rewards.sharpness import Sharpness
from agsm_rl_rewards.worker.http_client import FRAME, TOKEN_VARIABLE, HttpReward
from agsm_rl_rewards.worker.http_server import listen
from agsm_rl_rewards.worker_side.agsm_rl_worker import PREFIX, PROTOCOL, decode
from http_serving import QUICK, TOKEN, Settable, hello, post, question

from agsm_rl.errors import UserError


def test_health_says_that_it_is_there_without_a_token(serve):
    status, _, body = post(serve(Sharpness()), None, method="GET", path="/health", token=None)
    assert (status, json.loads(body)) == (200, {"protocol": PROTOCOL, "reward": "sharpness"})


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", "ü"])
def test_without_the_token_nothing_is_scored(serve, token):
    reward = Settable()
    reward.act = lambda images, prompts: pytest.fail("it was scored")
    status, _, body = post(serve(reward), question(), token=token)
    assert status == 401 and b"token" in body


BAD = {
    "no_frame": (b"hello", 400, "not a frame"),
    "nothing": (b"", 400, "truncated"),
    "truncated": (question()[:-1], 400, "truncated"),
    "more": (question() + b"x", 400, "follow the frame"),
    "op": (question(op="exit"), 400, "op is not"),
    "huge_claim": (PREFIX.pack(b"AGRW", 10, 2**62), 400, "over the limit"),
    "too_large": (b"x" * 20_001, 413, "over the limit"),
    "prompts": (question(prompts=["a"]), 422, "2 images, but 1 prompts"),
    "no_prompts": (question(prompts=None), 422, "list of texts"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_request_has_its_status_and_its_reason(serve, name):
    body, wanted, reason = BAD[name]
    url = serve(Sharpness(), body=20_000)
    assert post(url, hello())[0] == 200
    status, content_type, answer = post(url, body)
    told = decode(answer).header["message"] if content_type == FRAME else json.loads(answer)["error"]
    assert status == wanted and reason in told


def test_wrong_paths_methods_and_compression_are_refused(serve):
    url = serve(Sharpness())
    assert post(url, question(), path="/../etc/passwd")[0] == 404
    assert post(url, None, method="GET")[0] == 405
    assert post(url, question(), headers={"Content-Encoding": "gzip"})[0] == 415


def test_a_body_without_a_length_is_counted_as_it_comes(serve):
    url = serve(Sharpness(), body=20_000)
    # More than lies in buffers on the way: it is heard to its end before it is refused.
    status, _, _ = post(url, iter([b"x" * 2**20] * 24))
    assert status == 413


def slowly(url, start):
    """What a client gets that sends `start`, and then nothing."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(start)
        return connection.recv(65536)


def test_who_sends_slowly_is_cut_off(serve):
    url = serve(Sharpness(), read=2.0)
    assert slowly(url, b"POST /frame HTT") == b""
    assert slowly(url, b"") == b""
    head = f"POST /frame HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\nabc"
    assert b" 408 " in slowly(url, head.encode()).splitlines()[0]


def test_who_announces_too_much_is_told_so_however_slow_and_before_it_sends_if_it_asks(serve):
    head = f"POST /frame HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 30000\r\n"
    url = serve(Sharpness(), body=20_000, read=2.0)
    assert b" 413 " in slowly(url, f"{head}\r\nabc".encode()).splitlines()[0]
    url = serve(Sharpness(), body=20_000, read=60.0)
    assert b" 413 " in slowly(url, f"{head}Expect: 100-continue\r\n\r\n".encode()).splitlines()[0]


def test_a_reward_that_hangs_has_a_time_limit_and_others_are_told(serve):
    reward, free = Settable(), threading.Event()
    reward.act = lambda images, prompts: free.wait(20) and images[:, 0, 0, 0]
    url = serve(reward, score=0.3)
    assert post(url, question())[0] == 504
    assert post(url, question())[0] == 504
    free.set()
    reward.act = lambda images, prompts: images[:, 0, 0, 0]
    assert HttpReward(url=url, **QUICK)(torch.ones(1, 3, 2, 2), [""]).tolist() == [1.0]


def test_too_many_at_once_are_told_to_try_again(serve):
    reward, inside, free = Settable(), threading.Event(), threading.Event()

    def act(images, prompts):
        inside.set()
        free.wait(20)
        return images[:, 0, 0, 0]

    reward.act = act
    url = serve(reward, waiting=1)
    assert post(url, hello())[0] == 200
    first = threading.Thread(target=post, args=(url, question()))
    first.start()
    assert inside.wait(20)
    assert post(url, question())[0] == 503
    free.set()
    first.join()
    assert post(url, question())[0] == 200


def test_a_server_that_was_started_again_goes_on_scoring(serve):
    assert post(serve(Settable()), question())[0] == 200  # its clients greeted the one before it


def malformed(draw, good):
    """A request with something wrong: bytes of it changed, cut, doubled or made up, in its head or its body."""
    head, _, body = good.partition(b"\r\n\r\n")
    kind = draw.randrange(8)
    if kind == 0:
        return draw.randbytes(draw.randint(1, 400))
    if kind == 1:
        return good[: draw.randrange(len(good))]
    if kind == 2:
        return good.replace(b"Content-Length: ", b"Content-Length: " + draw.choice([b"-", b"x", b"9" * 30, b"0, "]))
    if kind == 3:
        return b"\r\n".join(line for line in head.split(b"\r\n") if draw.random() < 0.6) + b"\r\n\r\n" + body
    if kind == 4:
        return head.replace(b"\r\n", b"\r\nX-" + draw.randbytes(20) + b": 1\r\n", 1) + b"\r\n\r\n" + body
    if kind == 5:
        return head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + draw.choice([b"zz\r\n", b"ffffffffffff\r\n", body])
    # The body keeps its length: wrong in its prefix, or in its header.
    place = draw.randrange(len(PREFIX.pack(b"", 0, 0))) if kind == 6 else draw.randrange(len(body) - 400)
    changed = bytearray(body)
    for offset in range(draw.randint(1, 4)):
        changed[place + offset] = draw.randrange(256)
    return head + b"\r\n\r\n" + bytes(changed)


def exchanged(url, request):
    """The first line of the answer to raw bytes; b"" where the connection was ended without."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(request)
            return connection.recv(65536).partition(b"\r\n")[0]
        except OSError:
            return b""


def test_after_1200_malformed_requests_it_serves_as_before(serve):
    """Seeded. None is scored unless it says by chance what is right, none is a crash, nothing is left behind."""
    url = serve(Settable(), body=20_000, read=0.5, waiting=64)
    assert post(url, hello())[0] == 200
    body = question()
    good = f"POST /frame HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
    good = good.encode() + body
    # A machine that is short of time may cut one of these off as too slow, but not all.
    assert b"HTTP/1.1 200 OK" in [exchanged(url, good) for _ in range(5)]
    draw, statuses = random.Random(0), {}
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    requests = [malformed(draw, good) for _ in range(1200)]
    with ThreadPoolExecutor(32) as clients:  # those that wait for more wait together
        lines = list(clients.map(lambda request: exchanged(url, request), requests))
    for request, line in zip(requests, lines, strict=True):
        status = line.split(b" ")[1].decode() if line else "ended"
        statuses[status] = statuses.get(status, 0) + 1
        assert line == b"" or line.startswith(b"HTTP/1.1 "), (request, line)
    # A changed id or pixel is no mistake that can be seen; a failure of the server's own would be.
    assert set(statuses) <= {"200", "400", "401", "404", "405", "408", "413", "415", "422", "503", "ended"}, statuses
    assert statuses["400"] > 400 and statuses["401"] > 10
    assert b"HTTP/1.1 200 OK" in [exchanged(url, good) for _ in range(5)]
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    client = HttpReward(url=url, **(QUICK | {"retries": 5}))
    assert torch.equal(client(images, ["", ""]), images[:, 0, 0, 0])
    end = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > descriptors + 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    assert threading.active_count() <= threads + 3


@pytest.fixture
def command(tmp_path):
    """Start `agsm-rl serve-reward ...`; its processes are ended."""
    started = []

    def start(*arguments, **environment):
        clean = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        process = subprocess.Popen(
            [sys.executable, "-m", "agsm_rl", "serve-reward", *arguments],
            env=clean | environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_serve_reward_prints_address_and_token_and_ends_at_a_signal(command, monkeypatch):
    process = command("jpeg_compressibility", "--port", "0")
    url = process.stdout.readline().split()[-1]
    name, _, token = process.stdout.readline().strip().partition("=")
    monkeypatch.setenv(name, token)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(HttpReward(url=url, **QUICK)(images, ["", ""]), JpegCompressibility()(images, ["", ""]))
    process.terminate()
    process.wait(timeout=30)
    assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_serve_reward_takes_options_and_tells_mistakes(command):
    mistakes = {
        ("shapez",): "Did you mean 'shapes'?",
        ("shapes", "--option", "verdict=kind"): "verdict",
        ("os:system",): "--allow-import os",
        ("shapes", "--host", "0.0.0.0"): TOKEN_VARIABLE,
        ("shapes", "--host", "192.0.2.1", "--port", "1"): TOKEN_VARIABLE,
    }
    started = {arguments: command(*arguments) for arguments in mistakes}
    for arguments, words in mistakes.items():
        out, error = started[arguments].communicate(timeout=120)
        assert (started[arguments].returncode, out) == (2, ""), arguments
        assert words in error and "Traceback" not in error


def test_a_taken_port_is_told():
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="cannot listen on 127.0.0.1 port"):
        listen("127.0.0.1", taken.getsockname()[1])
