"""Questions about pictures, asked of a vision-language model over any OpenAI-compatible endpoint.

vLLM, SGLang, llama.cpp, or a hosted one. Each picture and question is one request. There are limits to the time and the
size of an answer, and no message shows a key.
"""

from __future__ import annotations

import base64
import email.utils
import io
import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import SplitResult

from agsm_rl_rewards.http_exchange import Answer, NoAnswer, is_loopback, parse_address, post
from agsm_rl_rewards.secret import VARIABLE_NAME, secret_from, without, without_credentials
from PIL import Image

from agsm_rl.errors import UserError

MAX_ALTERNATIVES = 20
"""The most alternatives to a token that OpenAI's interface returns."""
LOGPROBS = {"max_tokens": 1, "logprobs": True, "top_logprobs": MAX_ALTERNATIVES}
"""What a request for the first token's alternatives has besides the question."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries at most, whatever the server asks for."""
LARGEST_ANSWER = 4 * 2**20
"""Bytes; a reply with all its alternatives takes some thousand."""
TRY_AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Statuses that may pass: busy, rate limits, timeouts and a server's own faults."""
Read = TypeVar("Read")


class ChatEndpoint:
    """Asks a model about pictures, several requests at a time. UserError for an answer that never came or makes no
    sense: it is never made up.

    Args:
        who: The reward, for messages: `reward 'vlm_judge'`.
        url: Base URL of the endpoint, e.g. http://localhost:8000/v1.
        model: The model's name at the endpoint.
        api_key_env: The environment variable that holds the key.
        timeout: Seconds for one try, from connecting to the end of the answer.
        retries: Further tries, `backoff` · 1, 2, 4, … seconds apart, or as the server asks; at most 60 s.
        backoff: Seconds before the first further try.
        at_once: Number of requests sent at the same time.
    """

    def __init__(
        self,
        who: str,
        *,
        url: str,
        model: str,
        api_key_env: str | None,
        timeout: float,
        retries: int,
        backoff: float,
        at_once: int,
    ) -> None:
        address = _parsed(url)
        _check_variable(api_key_env)
        _check_numbers(timeout=timeout, retries=retries, backoff=backoff, at_once=at_once)
        self.who, self.model, self.api_key_env = who, model, api_key_env
        self.timeout, self.retries, self.backoff, self.at_once = timeout, retries, backoff, at_once
        self._address = address._replace(path=f"{address.path.rstrip('/')}/chat/completions")

    @staticmethod
    def permissions(url: str, api_key_env: str | None) -> list[str]:
        """What the command line must allow: sending pictures and prompts to another machine, and a key to any."""
        host = _parsed(url).hostname or ""
        _check_variable(api_key_env)
        needed = [] if is_loopback(host) else [f"host:{host}"]
        return needed + ([f"env:{api_key_env}"] if api_key_env is not None else [])

    def ask(
        self,
        asked: Sequence[tuple[Image.Image, str]],
        read: Callable[[Any, int], Read],
        options: Mapping[str, Any],
        *,
        needed: str,
    ) -> list[Read]:
        """What `read(choice, number)` makes of the first choice of each reply, in the order of the questions.

        `options`: what a request has besides the model and the question. `needed`: what a reply must have for `read`,
        which may raise LookupError, TypeError or AttributeError where it has not.
        """
        key, failed = self._key(), threading.Event()

        def answered(number: int, picture: Image.Image, question: str) -> Read:
            try:
                return self._answer(number, self._request(picture, question, options), read, needed, key, failed)
            except BaseException:
                failed.set()  # the others need not wait and try again
                raise

        with ThreadPoolExecutor(self.at_once) as pool:
            waiting = [pool.submit(answered, number, *item) for number, item in enumerate(asked)]
            try:
                return [job.result() for job in waiting]
            except BaseException:
                failed.set()
                pool.shutdown(cancel_futures=True)
                raise

    def error(self, what: str) -> UserError:
        """An error of this endpoint."""
        return UserError(f"{self.who}: {self._address.geturl()} {what}")

    def _key(self) -> str:
        """The key; "" where none is needed."""
        if self.api_key_env is None:
            return ""
        key = secret_from(self.api_key_env, who=self.who)
        if not key:
            raise UserError(
                f"{self.who}: api_key_env names the environment variable {self.api_key_env}, which is not set; "
                f"`export {self.api_key_env}=…`, or leave api_key_env out where no key is needed"
            )
        return key

    def _answer(
        self,
        number: int,
        request: bytes,
        read: Callable[[Any, int], Read],
        needed: str,
        key: str,
        failed: threading.Event,
    ) -> Read:
        body = self._ask(request, key, failed)
        said = short(without(key, body.decode(errors="replace")))
        reply = _from_json(body)
        if reply is None:
            raise self.error(f"did not reply in JSON: {said}")
        try:
            return read(reply["choices"][0], number)
        except (AttributeError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise self.error(f"replied without {needed}: {said}") from error
        except UserError as error:  # it may quote the reply
            raise UserError(without(key, str(error))) from None

    def _request(self, picture: Image.Image, question: str, options: Mapping[str, Any]) -> bytes:
        file = io.BytesIO()
        picture.save(file, format="PNG")
        image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        request = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        return json.dumps(request | dict(options)).encode()

    def _ask(self, request: bytes, key: str, failed: threading.Event) -> bytes:
        """The body of a good answer; UserError once the tries are used up, or when another one could not help."""
        for tries in range(1, self.retries + 2):
            answer, reason = self._try(request, key)
            if answer is not None and answer.status == 200:
                return answer.body
            hopeless = answer is not None and answer.status not in TRY_AGAIN
            if hopeless or tries > self.retries or failed.wait(self._pause(answer, tries)):
                break
        if answer is None:
            raise self.error(
                f"did not answer, {tries} tries of {self.timeout:g} s: {reason}. Is the server running, and is `url` "
                "right?"
            )
        after = "" if hopeless else f" after {tries} tries"
        body = short(without(key, answer.body.decode(errors="replace")))
        raise self.error(f"refused{after} with status {answer.status}: {body}")

    def _try(self, request: bytes, key: str) -> tuple[Answer | None, str]:
        """The answer, or None and the reason why there is none."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        # What this machine serves is reached directly: a proxy would get the pictures and the key.
        proxies = not is_loopback(self._address.hostname or "")
        try:
            answer = post(self._address, request, headers, timeout=self.timeout, limit=LARGEST_ANSWER, proxies=proxies)
        except NoAnswer as error:
            return None, without(key, str(error))
        if answer.too_long:
            raise self.error(f"sent an answer of more than {LARGEST_ANSWER:,} bytes")
        if answer.status == 200 and not answer.says_its_length and _from_json(answer.body) is None:
            return None, "the connection ended within the answer"
        return answer, ""

    def _pause(self, answer: Answer | None, tries: int) -> float:
        """Seconds before the next try: what the server's Retry-After asks for, else growing with the tries."""
        asked = None if answer is None else _retry_after(answer)
        return min(self.backoff * 2.0 ** min(tries - 1, 99) if asked is None else asked, LONGEST_PAUSE)


def first_token(choice: Any) -> list[tuple[str, float]]:
    """The likeliest beginnings of an answer as (token, probability); LookupError or TypeError without logprobs."""
    alternatives = choice["logprobs"]["content"][0]["top_logprobs"]
    return [(str(item["token"]), math.exp(item["logprob"])) for item in alternatives]


def word_of(token: str) -> str:
    """A token without its case and the spaces and marks around it."""
    return token.strip(" \n\t.,!\"'*▁Ġ").lower()


def fill_in(template: str, prompt: str, metadata: Mapping[str, Any]) -> str:
    """The template with {prompt} and {column} replaced; other braces stay as they are."""
    values = {**metadata, "prompt": prompt}
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


def short(value: Any) -> str:
    """A value on one line of at most 200 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"


def check_at_least_one(name: str, value: int) -> None:
    """UserError unless the option is 1 or more."""
    if value < 1:
        raise UserError(f"{name}: got {value}, but it must be 1 or more")


def _parsed(url: str) -> SplitResult:
    """The parts of an endpoint's base; UserError for anything but http(s)://machine[:port][/path]."""
    parts = parse_address(url)
    if parts is None:
        raise UserError(
            f"url: got '{without_credentials(url)}', but it must be an endpoint's base, e.g. http://localhost:8000/v1, "
            "without user, password or query"
        )
    return parts


def _check_variable(name: Any) -> None:
    """UserError, which does not show it, for what cannot be a variable's name: it may be the key itself."""
    if name is not None and not VARIABLE_NAME.fullmatch(str(name)):
        raise UserError(
            "api_key_env: this is not the name of an environment variable (letters, digits and _), and it is not shown "
            "here, in case it is the key itself; give the name of the variable that holds the key"
        )


def _from_json(body: bytes) -> Any:
    """What a reply in JSON holds; None if it is none."""
    try:
        return json.loads(body.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None


def _retry_after(answer: Answer) -> float | None:
    """Seconds until a server wants to be asked again: its Retry-After, a number or a date; None without either."""
    asked = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", asked):
        return float(asked)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _check_numbers(*, timeout: float, retries: int, backoff: float, at_once: int) -> None:
    if not 0 < timeout < threading.TIMEOUT_MAX:
        raise UserError(f"timeout: got {timeout}, but it must be above 0 seconds, and finite")
    for name, value in {"retries": retries, "backoff": backoff}.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name}: got {value}, but it must be 0 or more, and finite")
    check_at_least_one("at_once", at_once)
