"""A vision-language model as a judge, over any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a hosted one.

With `answer: yes_no` the score is P(yes) / (P(yes) + P(no)) of the reply's first token, after VQAScore (arXiv
2404.01291); with `answer: score` it is a number that the model writes.
"""

import base64
import email.utils
import io
import json
import math
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args
from urllib.parse import SplitResult

import torch
from agsm_rl_rewards.http_exchange import Answer, NoAnswer, is_loopback, parse_address, post
from agsm_rl_rewards.preprocessing import pictures
from agsm_rl_rewards.secret import VARIABLE_NAME, secret_from, without, without_credentials
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

AnswerKind = Literal["yes_no", "score"]
MAX_ALTERNATIVES = 20
"""The most alternatives to a token that OpenAI's interface returns."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries at most, whatever the server asks for."""
LARGEST_ANSWER = 4 * 2**20
"""Bytes; a reply with all its alternatives takes some thousand."""
TRY_AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Statuses that may pass: busy, rate limits, timeouts and a server's own faults."""
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
EXAMPLE = "Does this picture show {prompt}? Answer yes or no."


class VlmJudge:
    """Scores [B] by a vision-language model: a probability in [0, 1], or a number from `lowest` to `highest`.

    Each image is one request. Raises UserError if an image cannot be scored: a score is never made up.

    Args:
        url: Base URL of the endpoint, e.g. http://localhost:8000/v1.
        model: The model's name at the endpoint.
        question: The question, with {prompt} in the place of the prompt.
        answer: `yes_no` scores the probability of "yes" and needs an endpoint that returns logprobs; `score` takes the
            first number of the reply.
        lowest, highest: For `answer: score`: the range of the scores.
        api_key_env: The environment variable that holds the key, never the key itself. A recipe may send it only with
            `--allow-env` on the command line.
        timeout: Seconds for one try, from connecting to the end of the answer.
        retries: Further tries, `backoff` · 1, 2, 4, … seconds apart, or as the server asks; at most 60 s.
        backoff: Seconds before the first further try.
        at_once: Number of requests sent at the same time.
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
        answer: AnswerKind = "yes_no",
        lowest: float = 0.0,
        highest: float = 10.0,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        at_once: int = 8,
        max_tokens: int = 16,
    ) -> None:
        address = _parsed(url)
        _check_variable(api_key_env)
        if "{prompt}" not in question:
            raise UserError(f"question: it does not contain {{prompt}}; write e.g. '{EXAMPLE}'")
        if answer not in get_args(AnswerKind):
            raise unknown_name("answer", answer, "a kind of answer", get_args(AnswerKind))
        if not -math.inf < lowest < highest < math.inf:
            raise UserError(f"highest: got {highest}, but it must be above lowest ({lowest}), and both finite")
        _check_numbers(timeout=timeout, retries=retries, backoff=backoff, at_once=at_once, max_tokens=max_tokens)
        self.url, self.model, self.question, self.answer = url.rstrip("/"), model, question, answer
        self.lowest, self.highest, self.api_key_env = lowest, highest, api_key_env
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.at_once, self.max_tokens = at_once, max_tokens
        self.range = (0.0, 1.0) if answer == "yes_no" else (lowest, highest)
        self._address = address._replace(path=f"{address.path.rstrip('/')}/chat/completions")

    @staticmethod
    def permissions(options: Mapping[str, Any]) -> list[str]:
        """What the command line must allow: sending pictures and prompts to another machine, and a key to any."""
        host = _parsed(str(options["url"])).hostname or ""
        variable = options.get("api_key_env")
        _check_variable(variable)
        return ([] if is_loopback(host) else [f"host:{host}"]) + ([f"env:{variable}"] if variable is not None else [])

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        questions = [self.question.replace("{prompt}", prompt) for prompt in prompts]
        key, failed = self._key(), threading.Event()

        def scored(picture: Any, question: str) -> float:
            try:
                return self._score(picture, question, key, failed)
            except BaseException:
                failed.set()  # the others need not wait and try again
                raise

        with ThreadPoolExecutor(self.at_once) as pool:
            jobs = zip(pictures(images), questions, strict=True)
            waiting = [pool.submit(scored, picture, question) for picture, question in jobs]
            try:
                scores = [job.result() for job in waiting]
            except BaseException:
                failed.set()
                pool.shutdown(cancel_futures=True)
                raise
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _key(self) -> str:
        """The key; "" where none is needed."""
        if self.api_key_env is None:
            return ""
        key = secret_from(self.api_key_env, who=f"reward '{self.name}'")
        if not key:
            raise UserError(
                f"reward '{self.name}': api_key_env names the environment variable {self.api_key_env}, which is not "
                f"set; `export {self.api_key_env}=…`, or leave api_key_env out where no key is needed"
            )
        return key

    def _score(self, picture: Any, question: str, key: str, failed: threading.Event) -> float:
        body = self._ask(self._request(picture, question), key, failed)
        reply = _from_json(body)
        if reply is None:
            raise self._error(f"did not reply in JSON: {_short(without(key, body.decode(errors='replace')))}")
        try:
            choice = reply["choices"][0]
            if self.answer == "yes_no":
                return self._probability(choice["logprobs"]["content"][0]["top_logprobs"])
            return self._number(choice["message"]["content"], question)
        except (AttributeError, KeyError, IndexError, TypeError, OverflowError) as error:
            needed = "logprobs (if it has none, use `answer: score`)" if self.answer == "yes_no" else "a message"
            said = _short(without(key, body.decode(errors="replace")))
            raise self._error(f"replied without {needed}: {said}") from error

    def _request(self, picture: Any, question: str) -> bytes:
        file = io.BytesIO()
        picture.save(file, format="PNG")
        image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        request = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        if self.answer == "yes_no":
            request |= {"max_tokens": 1, "logprobs": True, "top_logprobs": MAX_ALTERNATIVES}
        else:
            request |= {"max_tokens": self.max_tokens}
        return json.dumps(request).encode()

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
            raise self._error(
                f"did not answer, {tries} tries of {self.timeout:g} s: {reason}. Is the server running, and is `url` "
                "right?"
            )
        after = "" if hopeless else f" after {tries} tries"
        body = _short(without(key, answer.body.decode(errors="replace")))
        raise self._error(f"refused{after} with status {answer.status}: {body}")

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
            raise self._error(f"sent an answer of more than {LARGEST_ANSWER:,} bytes")
        if answer.status == 200 and not answer.says_its_length and _from_json(answer.body) is None:
            return None, "the connection ended within the answer"
        return answer, ""

    def _pause(self, answer: Answer | None, tries: int) -> float:
        """Seconds before the next try: what the server's Retry-After asks for, else growing with the tries."""
        asked = None if answer is None else _retry_after(answer)
        return min(self.backoff * 2.0 ** min(tries - 1, 99) if asked is None else asked, LONGEST_PAUSE)

    def _error(self, what: str) -> UserError:
        return UserError(f"reward '{self.name}': {self._address.geturl()} {what}")

    def _probability(self, alternatives: list[dict[str, Any]]) -> float:
        """P(yes) over P(yes) + P(no); tokens count whatever their case and the spaces and marks around them."""
        likelihood = {"yes": 0.0, "no": 0.0}
        for alternative in alternatives:
            word = alternative["token"].strip(" \n\t.,!\"'*▁Ġ").lower()
            if word in likelihood:
                likelihood[word] += math.exp(alternative["logprob"])
        total = sum(likelihood.values())
        if not 0 < total < math.inf:
            tokens = ", ".join(repr(alternative["token"])[:40] for alternative in alternatives[:5])
            raise UserError(
                f"reward '{self.name}': neither yes nor no is among the {len(alternatives)} likeliest beginnings of "
                f"the answer ({tokens}, …); let `question` ask for yes or no and nothing else"
            )
        return likelihood["yes"] / total

    def _number(self, text: str, question: str) -> float:
        match = NUMBER.search(text)
        if match is None or not self.lowest <= float(match.group()) <= self.highest:
            raise UserError(
                f"reward '{self.name}': expected a number from {self.lowest:g} to {self.highest:g}, but the answer to "
                f"'{_short(question)}' was '{_short(text)}'; let `question` ask for the number and nothing else"
            )
        return float(match.group())


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


def _check_numbers(*, timeout: float, retries: int, backoff: float, at_once: int, max_tokens: int) -> None:
    if not 0 < timeout < threading.TIMEOUT_MAX:
        raise UserError(f"timeout: got {timeout}, but it must be above 0 seconds, and finite")
    for name, value in {"retries": retries, "backoff": backoff}.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name}: got {value}, but it must be 0 or more, and finite")
    for name, value in {"at_once": at_once, "max_tokens": max_tokens}.items():
        if value < 1:
            raise UserError(f"{name}: got {value}, but it must be 1 or more")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"
