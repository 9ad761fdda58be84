"""A judge over an OpenAI-compatible endpoint, against a small server on this machine."""

import base64
import contextlib
import io
import itertools
import json
import socket
import threading
import time
import tracemalloc

import pytest
import torch
from agsm_rl_rewards import chat_endpoint
from agsm_rl_rewards.vlm_judge import VlmJudge
from chat_serving import likely, said, serving
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Reward


@pytest.fixture
def endpoint():
    with serving() as server:
        yield server


def judge(endpoint, **options):
    return VlmJudge(**({"url": endpoint.url, "model": "tiny-vlm", "backoff": 0.01, "timeout": 5.0} | options))


IMAGES = torch.zeros(2, 3, 4, 6)
IMAGES[1, 0] = 1.0


def test_yes_against_no_is_the_score(endpoint):
    endpoint.reply = lambda body: (200, likely(Yes=0.5, _yes=0.1, no=0.2, NO=0.0001, maybe=0.1))
    scores = judge(endpoint)(IMAGES[:1], ["a star"])
    assert scores.item() == pytest.approx(0.6 / 0.8001, abs=1e-6)


def test_the_request_is_what_openai_compatible_servers_take(endpoint):
    endpoint.reply = lambda body: (200, likely(yes=1.0))
    judge(endpoint, question="Is {prompt} here? {braces} stay.")(IMAGES[1:], ["a {star}"])
    ((path, headers, body, _),) = endpoint.asked
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Is a {star} here? {braces} stay."}
    kind, _, data = image["image_url"]["url"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64" and picture.size == (6, 4) and picture.getpixel((0, 0)) == (255, 0, 0)
    del body["messages"]
    assert body == {"model": "tiny-vlm", "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}


def test_the_question_may_ask_for_a_column_of_the_prompts_file(endpoint):
    endpoint.reply = lambda body: (200, likely(yes=1.0))
    rows = [{"style": "an {ink} painting", "n": 3}, {}]
    judge(endpoint, question="Is {prompt} {style} {n}?", at_once=1)(IMAGES, ["a {n}", "b"], rows)
    questions = [body["messages"][0]["content"][1]["text"] for _, _, body, _ in endpoint.asked]
    assert questions == ["Is a {n} an {ink} painting 3?", "Is b {style} {n}?"]


def test_scores_come_in_the_images_order_however_slow_each_is(endpoint):
    def reply(body):
        question = body["messages"][0]["content"][1]["text"]
        number = int(question.split()[1])
        time.sleep(0.05 if number == 0 else 0)
        return 200, said(f"I give it {number}.5 points, no more.")

    endpoint.reply = reply
    rater = judge(endpoint, answer="score", question="Rate {prompt} now", at_once=4)
    assert rater(IMAGES[[0, 1, 0, 1]], ["0 a", "1 b", "2 c", "3 d"]).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert rater.range == (0.0, 10.0)
    assert {"logprobs", "top_logprobs"}.isdisjoint(endpoint.asked[0][2])


def test_the_score_may_come_after_what_the_model_reasons(endpoint):
    endpoint.reply = lambda body: (200, said("cat (object): 1\nFinal Score: 2\nFinal Score: 4.5."))
    rater = judge(endpoint, answer="score", lowest=1, highest=5, after="Final Score:", max_tokens=512)
    assert rater(IMAGES[:1], ["a cat"]).tolist() == [4.5]
    assert endpoint.asked[0][2]["max_tokens"] == 512
    endpoint.reply = lambda body: (200, said("cat (object): 1"))
    with pytest.raises(UserError, match="ask for the number after 'Final Score:', and max_tokens leave room"):
        rater(IMAGES[:1], ["a cat"])
    with pytest.raises(UserError, match="after: got 'Score', but it is the text before the number of `answer: score`"):
        judge(endpoint, after="Score")


def test_requests_are_under_way_together(endpoint):
    meeting = threading.Barrier(3, timeout=5)

    def reply(body):
        meeting.wait()
        return 200, likely(yes=1.0)

    endpoint.reply = reply
    assert judge(endpoint, at_once=3)(IMAGES[[0, 0, 0]], ["a"] * 3).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("status", [429, 503])
def test_what_may_pass_is_tried_again_with_growing_pauses(endpoint, status):
    failures = iter([status, status, status])
    endpoint.reply = lambda body: (next(failures, 200), likely(yes=0.25, no=0.75))
    scores = judge(endpoint, retries=3, backoff=0.05)(IMAGES[:1], ["a star"])
    assert scores.item() == pytest.approx(0.25)
    times = [asked[3] for asked in endpoint.asked]
    pauses = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert len(times) == 4 and pauses[1] >= 0.09 and pauses[2] >= 0.19


def test_when_it_does_not_pass_that_is_an_error_and_no_score(endpoint):
    endpoint.reply = lambda body: (503, b"overloaded, come back tomorrow")
    with pytest.raises(
        UserError, match=r"reward 'vlm_judge': .*/v1/chat/completions refused after 3 tries with status 503"
    ):
        judge(endpoint, retries=2)(IMAGES[:1], ["a star"])
    assert len(endpoint.asked) == 3


def test_what_cannot_pass_is_not_tried_again(endpoint):
    endpoint.reply = lambda body: (404, {"error": {"message": "no such model: tiny-vlm"}})
    with pytest.raises(UserError, match=r"refused with status 404: .*no such model: tiny-vlm"):
        judge(endpoint)(IMAGES[:1], ["a star"])
    assert len(endpoint.asked) == 1


def test_a_server_that_hangs_is_given_up(endpoint):
    release = threading.Event()
    endpoint.reply = lambda body: (200, likely(yes=1.0)) if release.wait(5) else (500, b"")
    with pytest.raises(UserError, match=r"did not answer, 2 tries of 0\.1 s: .*[Tt]imed out.*Is the server running"):
        judge(endpoint, timeout=0.1, retries=1)(IMAGES[:1], ["a star"])
    release.set()
    end = time.monotonic() + 20  # the second try was given up, and may not have been read yet
    while len(endpoint.asked) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(endpoint.asked) == 2


def bytewise(*parts, pause=0.05):
    """A server that sends these bytes to everyone, whatever is asked, with pauses; gives its address and its visits."""
    listening, visits = socket.create_server(("127.0.0.1", 0)), []

    def serve(connection, content):
        with connection, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in connection.recv(65536):
                pass
            for part in content:
                connection.sendall(part)
                time.sleep(pause)

    def run():
        while True:
            connection, _ = listening.accept()
            visits.append(time.monotonic())
            content = parts[min(len(visits), len(parts)) - 1]
            threading.Thread(target=serve, args=(connection, content), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/v1", visits


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DRIPPING = {
    "its head": itertools.repeat(b"H"),
    "its headers": itertools.chain([HEAD], itertools.repeat(b"X")),
    "one more head each time": itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "its body": itertools.chain([HEAD + b"\r\n"], itertools.repeat(b" ")),
    "its body, of a known length": itertools.chain([HEAD + b"Content-Length: 9999\r\n\r\n"], itertools.repeat(b" ")),
    "its body, in chunks": itertools.chain(
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\n \r\n")
    ),
}


@pytest.mark.parametrize("drips", DRIPPING)
def test_a_server_that_drips_is_given_up_at_the_time_limit(drips):
    url, _ = bytewise(DRIPPING[drips])
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"did not answer, 1 tries of 0.5 s: timed out"):
        VlmJudge(url=url, model="m", timeout=0.5, retries=0)(IMAGES[:1], ["a star"])
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "head", [b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"Content-Length: 9999999999\r\n\r\n"]
)
def test_an_endless_answer_is_not_kept_in_memory(head):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n" if b"chunked" in head else b" " * 65536
    url, _ = bytewise(itertools.chain([HEAD + head], itertools.repeat(chunk, 2000)), pause=0)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"sent an answer of more than 4,194,304 bytes"):
        VlmJudge(url=url, model="m", timeout=30.0, retries=0)(IMAGES[:1], ["a star"])
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "cut",
    [b"", b"HTTP/1.1 2", HEAD[:30], HEAD + b"Content-Length: 900\r\n\r\n{", HEAD + b'\r\n{"', b"SSH-2.0-OpenSSH\r\n"],
)
def test_an_answer_that_is_cut_anywhere_is_asked_for_again(cut):
    good = json.dumps(likely(yes=0.25, no=0.75)).encode()
    url, visits = bytewise([cut], [HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(good), good)])
    assert VlmJudge(url=url, model="m", retries=1, backoff=0.01)(IMAGES[:1], ["a star"]).item() == pytest.approx(0.25)
    assert len(visits) == 2
    url, visits = bytewise([cut])
    with pytest.raises(UserError, match="did not answer, 3 tries"):
        VlmJudge(url=url, model="m", retries=2, backoff=0.01)(IMAGES[:1], ["a star"])
    assert len(visits) == 3


@pytest.mark.parametrize("asked", ["0.3", "100000000", "Fri, 31 Dec 2100 23:59:59 GMT", "nonsense", "-5"])
def test_what_the_server_asks_for_never_means_more_than_the_longest_pause(monkeypatch, asked):
    monkeypatch.setattr(chat_endpoint, "LONGEST_PAUSE", 0.2)
    url, visits = bytewise([b"HTTP/1.1 429 Slow\r\nRetry-After: %s\r\nContent-Length: 0\r\n\r\n" % asked.encode()])
    with pytest.raises(UserError, match="refused after 3 tries with status 429"):
        VlmJudge(url=url, model="m", retries=2, backoff=0.01)(IMAGES[:1], ["a star"])
    assert len(visits) == 3 and visits[-1] - visits[0] < 5
    if asked.startswith(("1", "F")):
        assert visits[-1] - visits[0] >= 0.4


def test_when_one_image_cannot_be_scored_the_others_stop_trying(endpoint):
    def reply(body):
        question = body["messages"][0]["content"][1]["text"]
        return (404, b"no such model") if "first" in question else (503, b"busy")

    endpoint.reply = reply
    begin = time.monotonic()
    with pytest.raises(UserError, match="refused"):
        judge(endpoint, backoff=30.0)(IMAGES, ["first", "second"])
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b'{"choices": NaN}', b"null", b'{"choices": [[]]}'])
def test_odd_json_is_one_message(endpoint, content):
    endpoint.reply = lambda body: (200, content)
    with pytest.raises(UserError, match="reward 'vlm_judge': .*(did not reply in JSON|replied without)"):
        judge(endpoint)(IMAGES[:1], ["a star"])


def test_a_proxy_that_the_environment_names_is_used_for_other_machines_alone(endpoint, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://me:pass@127.0.0.1:{endpoint.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    endpoint.reply = lambda body: (200, likely(yes=1.0))
    assert judge(endpoint, url="http://judge.example/v1")(IMAGES[:1], ["a star"]).tolist() == [1.0]
    path, headers, _, _ = endpoint.asked[0]
    assert path == "http://judge.example/v1/chat/completions" and headers["Host"] == "judge.example"
    assert headers["Proxy-Authorization"] == "Basic " + base64.b64encode(b"me:pass").decode()
    monkeypatch.setenv("http_proxy", "socks5://me:MYSECRET@127.0.0.1:9")
    with pytest.raises(UserError, match="proxy socks5://•••@127.0.0.1:9, but only http:// proxies") as told:
        judge(endpoint, url="http://judge.example/v1")(IMAGES[:1], ["a star"])
    assert "MYSECRET" not in str(told.value)


def test_no_server_at_all_is_said(endpoint):
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(UserError, match=r"did not answer, 1 tries.*is `url` right"):
        judge(endpoint, retries=0)(IMAGES[:1], ["a star"])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (said("yes"), "without logprobs .if it has none, use `answer: score`"),
        (likely(maybe=0.6, perhaps=0.4), r"neither yes nor no .*'maybe', 'perhaps'.*let `question` ask"),
        ({"error": "odd"}, "without logprobs"),
        (b"<html>a proxy's page</html>", "did not reply in JSON: <html>"),
    ],
)
def test_a_reply_without_a_verdict_is_an_error(endpoint, reply, message):
    endpoint.reply = lambda body: (200, reply)
    with pytest.raises(UserError, match=message):
        judge(endpoint)(IMAGES[:1], ["a star"])


@pytest.mark.parametrize("text", ["a fine picture", "11", "-3", ""])
def test_a_reply_without_a_number_in_the_range_is_an_error(endpoint, text):
    endpoint.reply = lambda body: (200, said(text))
    with pytest.raises(UserError, match=f"expected a number from 0 to 10, but .* was '{text}'"):
        judge(endpoint, answer="score")(IMAGES[:1], ["a star"])


def test_the_key_comes_from_the_environment_and_is_never_told(endpoint, monkeypatch):
    monkeypatch.setenv("MY_JUDGES_KEY", "secret-123")
    endpoint.reply = lambda body: (401, b"bad key")
    keyed = judge(endpoint, api_key_env="MY_JUDGES_KEY")
    with pytest.raises(UserError, match="status 401: bad key") as caught:
        keyed(IMAGES[:1], ["a star"])
    assert endpoint.asked[0][1]["Authorization"] == "Bearer secret-123"
    assert "secret-123" not in str(caught.value)
    endpoint.reply = lambda body: (200, said("you sent secret-123"))
    with pytest.raises(UserError, match="expected a number .* was 'you sent •••'"):
        judge(endpoint, api_key_env="MY_JUDGES_KEY", answer="score")(IMAGES[:1], ["a star"])
    monkeypatch.delenv("MY_JUDGES_KEY")
    with pytest.raises(UserError, match=r"MY_JUDGES_KEY, which is not set; `export MY_JUDGES_KEY="):
        keyed(IMAGES[:1], ["a star"])


def test_a_password_in_netrc_does_not_take_the_keys_place(endpoint, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("MY_JUDGES_KEY", "secret-123")
    endpoint.reply = lambda body: (200, likely(yes=1.0))
    judge(endpoint, api_key_env="MY_JUDGES_KEY")(IMAGES[:1], ["a star"])
    judge(endpoint)(IMAGES[:1], ["a star"])
    assert [asked[1].get("Authorization") for asked in endpoint.asked] == ["Bearer secret-123", None]


def test_what_this_machine_serves_is_not_asked_for_through_a_proxy(endpoint, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    endpoint.reply = lambda body: (200, likely(yes=1.0))
    assert judge(endpoint)(IMAGES[:1], ["a star"]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://localhost:8000/v1", []),
        ("http://127.0.0.1:8000/v1", []),
        ("http://[::1]:8000/v1", []),
        ("https://API.judge.example/v1", ["host:api.judge.example"]),
        ("http://localhost.judge.example/v1", ["host:localhost.judge.example"]),
        ("http://192.168.0.7/v1", ["host:192.168.0.7"]),
    ],
)
def test_another_machine_needs_a_permission(url, wanted):
    assert VlmJudge.permissions({"url": url}) == wanted


def test_redirects_to_elsewhere_are_not_followed(endpoint):
    endpoint.reply = lambda body: (307, b"go there")
    with pytest.raises(UserError, match="refused with status 307"):
        judge(endpoint)(IMAGES[:1], ["a star"])
    assert len(endpoint.asked) == 1


def test_it_follows_the_interface(endpoint):
    endpoint.reply = lambda body: (200, likely(yes=0.5, no=0.5))
    reward = judge(endpoint)
    assert isinstance(reward, Reward) and not reward.differentiable and reward.range == (0.0, 1.0)
    scores = reward(IMAGES, ["a", "b"])
    assert scores.shape == (2,) and scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url: got 'localhost:8000', but it must be an endpoint's base"),
        (
            {"url": "http://me:secret@judge.example/v1"},
            "got 'http://•••@judge.example/v1', but it must be",
        ),
        ({"question": "Is it good?"}, "question: it does not contain {prompt}"),
        ({"answer": "yesno"}, "answer: 'yesno' .* Did you mean 'yes_no'"),
        ({"lowest": 5.0, "highest": 5.0}, "highest: got 5.0, but it must be above lowest"),
        ({"timeout": 0.0}, "timeout: got 0.0"),
        ({"retries": -1}, "retries: got -1"),
        ({"at_once": 0}, "at_once: got 0"),
    ],
)
def test_impossible_options_are_refused(endpoint, options, message):
    with pytest.raises(UserError, match=message):
        judge(endpoint, **options)
