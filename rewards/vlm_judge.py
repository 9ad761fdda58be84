"""A vision-language model as a judge, over any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a hosted one.

With `answer: yes_no` the score is P(yes) / (P(yes) + P(no)) of the reply's first token, after VQAScore (arXiv
2404.01291); with `answer: score` it is a number that the model writes.
"""

import base64
import io
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

Answer = Literal["yes_no", "score"]
TOP = 20
"""The most alternatives to a token that OpenAI's interface gives."""
WAIT_AT_MOST = 60
"""Seconds between two tries."""
TRY_AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Statuses that may pass: busy, rate limits, timeouts and a server's own faults."""
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
EXAMPLE = "Does this picture show {prompt}? Answer yes or no."


class VlmJudge:
    """Scores [B] by a vision-language model: a probability in [0, 1], or a number from `lowest` to `highest`.

    Each image is a request of its own. UserError when an image cannot be scored: a score is never made up.

    Args:
        url: Base URL of the endpoint, e.g. http://localhost:8000/v1.
        model: The model's name at the endpoint.
        question: What is asked, with {prompt} where the prompt belongs.
        answer: `yes_no` scores the probability of "yes", and needs an endpoint that gives logprobs; `score` takes the
            first number of the reply.
        lowest, highest: For `answer: score`: the range of the scores.
        api_key_env: The environment variable that holds the key; the key itself never stands in a recipe.
        timeout: Seconds for one try.
        retries: Further tries, `backoff` · 1, 2, 4, … seconds apart (or as the server asks).
        backoff: Seconds before the first further try.
        at_once: Requests under way at the same time.
        max_tokens: For `answer: score`: the longest reply.
    """

    name = "vlm_judge"
    range = (0.0, 1.0)
    licence = "the model's own"
    differentiable = False
    elsewhere = True

    def __init__(
        self,
        *,
        url: str,
        model: str,
        question: str = EXAMPLE,
        answer: Answer = "yes_no",
        lowest: float = 0.0,
        highest: float = 10.0,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        at_once: int = 8,
        max_tokens: int = 16,
    ) -> None:
        _host(url)
        if "{prompt}" not in question:
            raise UserError(f"question: there is no {{prompt}} in it; write e.g. '{EXAMPLE}'")
        if answer not in get_args(Answer):
            raise unknown_name("answer", answer, "a kind of answer", get_args(Answer))
        if not lowest < highest:
            raise UserError(f"highest: got {highest}, but it must be above lowest ({lowest})")
        _check_numbers(timeout=timeout, retries=retries, backoff=backoff, at_once=at_once, max_tokens=max_tokens)
        self.url, self.model, self.question, self.answer = url.rstrip("/"), model, question, answer
        self.lowest, self.highest, self.api_key_env = lowest, highest, api_key_env
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.at_once, self.max_tokens = at_once, max_tokens
        self.range = (0.0, 1.0) if answer == "yes_no" else (lowest, highest)

    @staticmethod
    def permissions(options: Mapping[str, Any]) -> list[str]:
        """What the command line must allow: sending pictures, prompts and a key to another machine."""
        host = _host(str(options["url"]))
        return [] if _is_this_machine(host) else [f"host:{host}"]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        from agsm_rl_rewards.trl_style import pictures

        questions = [self.question.replace("{prompt}", prompt) for prompt in prompts]
        with self._session() as session, ThreadPoolExecutor(self.at_once) as pool:
            jobs = zip(pictures(images), questions, strict=True)
            waiting = [pool.submit(self._score, session, picture, question) for picture, question in jobs]
            try:
                scores = [job.result() for job in waiting]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _session(self) -> Any:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        session = requests.Session()
        # What this machine serves is reached directly: a proxy would be given pictures and key.
        session.trust_env = not _is_this_machine(_host(self.url))
        again = Retry(
            total=self.retries,
            backoff_factor=self.backoff,
            backoff_max=WAIT_AT_MOST,
            retry_after_max=WAIT_AT_MOST,
            status_forcelist=TRY_AGAIN,
            allowed_methods={"POST"},
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=self.at_once))
        key = self._key()

        def authorise(request: Any) -> Any:
            # As a function, so that requests does not put a password from ~/.netrc in its place.
            if key is not None:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        session.auth = authorise
        return session

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UserError(
                f"reward '{self.name}': api_key_env names the environment variable {self.api_key_env}, which is not "
                f"set; `export {self.api_key_env}=…`, or leave api_key_env out where no key is needed"
            )
        return key

    def _score(self, session: Any, picture: Any, question: str) -> float:
        reply = self._ask(session, self._request(picture, question))
        try:
            choice = reply["choices"][0]
            if self.answer == "yes_no":
                return self._probability(choice["logprobs"]["content"][0]["top_logprobs"])
            return self._number(choice["message"]["content"], question)
        except (KeyError, IndexError, TypeError) as error:
            wanted = "logprobs (if it has none, use `answer: score`)" if self.answer == "yes_no" else "a message"
            raise UserError(f"reward '{self.name}': {self.url} replied without {wanted}: {_short(reply)}") from error

    def _request(self, picture: Any, question: str) -> dict[str, Any]:
        file = io.BytesIO()
        picture.save(file, format="PNG")
        image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        request = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        if self.answer == "yes_no":
            return request | {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        return request | {"max_tokens": self.max_tokens}

    def _ask(self, session: Any, request: dict[str, Any]) -> Any:
        import requests

        address = f"{self.url}/chat/completions"
        try:
            # Redirects are not followed: they could lead to a machine that was not allowed.
            reply = session.post(address, json=request, timeout=self.timeout, allow_redirects=False)
            if reply.status_code == 200:
                return reply.json()
        except requests.exceptions.JSONDecodeError as error:
            raise UserError(f"reward '{self.name}': {address} did not reply in JSON: {_short(reply.text)}") from error
        except requests.RequestException as error:
            raise UserError(
                f"reward '{self.name}': {address} did not answer, {self.retries + 1} tries of {self.timeout:g} s: "
                f"{_short(error)}. Is the server running, and is `url` right?"
            ) from error
        tries = f" after {self.retries + 1} tries" if reply.status_code in TRY_AGAIN else ""
        raise UserError(
            f"reward '{self.name}': {address} refused{tries} with status {reply.status_code}: {_short(reply.text)}"
        )

    def _probability(self, alternatives: list[dict[str, Any]]) -> float:
        """P(yes) over P(yes) + P(no); tokens count whatever their case and the spaces and marks around them."""
        found = {"yes": 0.0, "no": 0.0}
        for one in alternatives:
            word = one["token"].strip(" \n\t.,!\"'*▁Ġ").lower()
            if word in found:
                found[word] += math.exp(one["logprob"])
        total = sum(found.values())
        if total == 0:
            tokens = ", ".join(repr(one["token"]) for one in alternatives[:5])
            raise UserError(
                f"reward '{self.name}': neither yes nor no is among the {len(alternatives)} likeliest beginnings of "
                f"the answer ({tokens}, …); let `question` ask for yes or no and nothing else"
            )
        return found["yes"] / total

    def _number(self, text: str, question: str) -> float:
        found = NUMBER.search(text)
        if found is None or not self.lowest <= float(found.group()) <= self.highest:
            raise UserError(
                f"reward '{self.name}': a number from {self.lowest:g} to {self.highest:g} was wanted, but the answer "
                f"to '{_short(question)}' was '{_short(text)}'; let `question` ask for the number and nothing else"
            )
        return float(found.group())


def _host(url: str) -> str:
    """The machine behind an address; UserError for anything but http(s)://machine[:port][/path]."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username is not None:
        raise UserError(f"url: got '{url}', but an endpoint's base is wanted, e.g. http://localhost:8000/v1")
    return parts.hostname or ""


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_numbers(*, timeout: float, retries: int, backoff: float, at_once: int, max_tokens: int) -> None:
    if not timeout > 0:
        raise UserError(f"timeout: got {timeout}, but it must be above 0 seconds")
    for name, value in {"retries": retries, "backoff": backoff}.items():
        if value < 0:
            raise UserError(f"{name}: got {value}, but it must be 0 or more")
    for name, value in {"at_once": at_once, "max_tokens": max_tokens}.items():
        if value < 1:
            raise UserError(f"{name}: got {value}, but it must be 1 or more")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"
