"""Keys and tokens: used without the line end that files give them, and in no message."""

import base64
from urllib.parse import quote

import pytest
import torch
from agsm_rl_rewards.secret import secret_from, without
from agsm_rl_rewards.sharpness import Sharpness
from agsm_rl_rewards.vlm_judge import VlmJudge
from agsm_rl_rewards.worker.http_client import TOKEN_VARIABLE, HttpReward
from http_serving import QUICK, TOKEN
from test_http_reward import answering

from agsm_rl.errors import UserError

IMAGES = torch.zeros(1, 3, 4, 4)
BAD = ["my\nSECRET", "SECRET\r\nX-Other: 1", "SECRET\x00".replace("\x00", "\x07") + "x", "SECRETü", "SECRET\u2028x"]


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t\n"])
def test_a_line_end_is_no_part_of_a_token(serve, monkeypatch, end):
    url = serve(Sharpness())
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN + end)
    assert HttpReward(url=url, **QUICK)(IMAGES, [""]).shape == (1,)


@pytest.mark.parametrize("value", BAD)
def test_what_no_header_can_carry_is_refused_and_not_shown(monkeypatch, value):
    monkeypatch.setenv(TOKEN_VARIABLE, value)
    monkeypatch.setenv("JUDGE_KEY", value)
    judge = VlmJudge(url="http://127.0.0.1:1/v1", model="m", api_key_env="JUDGE_KEY", retries=0)
    for reward, variable in ((HttpReward(url="http://127.0.0.1:1", retries=0), TOKEN_VARIABLE), (judge, "JUDGE_KEY")):
        with pytest.raises(UserError, match=f"variable {variable} holds a control or non-ASCII") as told:
            reward(IMAGES, [""])
        assert "SECRET" not in str(told.value) and "SECRET" not in repr(told.value.__cause__)


def test_a_secret_is_hidden_in_every_form_that_a_server_may_send_back():
    secret = "my+SECRET/key="
    forms = [secret, quote(secret), quote(secret, safe=""), base64.b64encode(secret.encode()).decode()]
    assert without(secret, " ".join(forms)) == " ".join(["•••"] * len(forms))
    assert without("", "as it is") == "as it is"


def test_a_variable_that_is_not_set_is_no_secret(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    assert secret_from("NOT_SET", who="test") == ""


def test_a_server_that_sends_the_secret_back_does_not_get_it_into_a_message(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "MYSECRET")
    body = b"you sent Bearer MYSECRET, TVlTRUNSRVQ="
    url = answering(b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    judge = VlmJudge(url=url, model="m", api_key_env=TOKEN_VARIABLE, retries=0)
    for reward in (HttpReward(url=url, retries=0), judge):
        with pytest.raises(UserError, match="status 401: you sent Bearer •••, •••") as told:
            reward(IMAGES, [""])
        assert "MYSECRET" not in str(told.value)
