"""Requests to a served reward, for its tests."""

import http.client

import torch
from agsm_rl_rewards.worker.remote import as_array
from agsm_rl_rewards.worker_side.agsm_rl_worker import PROTOCOL, encode

TOKEN = "a-token-for-tests"
QUICK = {"timeout": 20.0, "retries": 1, "backoff": 0.001}


class Settable:
    """A reward that does what the test says."""

    name, range = "settable", (-1e9, 1e9)

    def __init__(self):
        self.act = lambda images, prompts: images[:, 0, 0, 0]

    def __call__(self, images, prompts):
        return self.act(images, prompts)


def question(**changes):
    header = {"op": "score", "id": 1, "prompts": ["", ""], **changes}
    return b"".join(encode(header, [as_array(torch.zeros(2, 3, 4, 4), "float32")]))


def hello():
    return b"".join(encode({"op": "hello", "protocol": [PROTOCOL]}))


def post(url, body, *, token=TOKEN, path="/frame", method="POST", headers=None):
    """Status, content type and body of one request."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    sent = {"Authorization": f"Bearer {token}"} if token is not None else {}
    connection.request(method, path, body, sent | (headers or {}))
    answer = connection.getresponse()
    found = answer.status, answer.getheader("Content-Type"), answer.read()
    connection.close()
    return found
