"""A vision-language model as a judge, over any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a hosted one.

With `answer: yes_no` the score is P(yes) / (P(yes) + P(no)) of the reply's first token, after VQAScore (arXiv
2404.01291); with `answer: score` it is a number that the model writes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from agsm_rl_rewards.chat_endpoint import (
    LOGPROBS,
    ChatEndpoint,
    check_at_least_one,
    fill_in,
    first_token,
    short,
    word_of,
)
from agsm_rl_rewards.preprocessing import pictures
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

AnswerKind = Literal["yes_no", "score"]
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
EXAMPLE = "Does this picture show {prompt}? Answer yes or no."


class VlmJudge:
    """Scores [B] by a vision-language model: a probability in [0, 1], or a number from `lowest` to `highest`.

    Each image is one request. Raises UserError if an image cannot be scored: a score is never made up.

    Args:
        url: Base URL of the endpoint, e.g. http://localhost:8000/v1.
        model: The model's name at the endpoint.
        question: The question, with {prompt} in the place of the prompt and {column} in that of another column of the
            prompts' file.
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
        after: For `answer: score`: the text that comes before the number, such as `Final Score:`; of several the last
            counts. Null takes the first number of the reply.
    """

    name = "vlm_judge"
    range = (0.0, 1.0)
    licence = "the model's own"
    differentiable = False
    elsewhere = True
    takes_metadata = True

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
        after: str | None = None,
    ) -> None:
        self._endpoint = ChatEndpoint(
            f"reward '{self.name}'",
            url=url,
            model=model,
            api_key_env=api_key_env,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            at_once=at_once,
        )
        if "{prompt}" not in question:
            raise UserError(f"question: it does not contain {{prompt}}; write e.g. '{EXAMPLE}'")
        if answer not in get_args(AnswerKind):
            raise unknown_name("answer", answer, "a kind of answer", get_args(AnswerKind))
        if not -math.inf < lowest < highest < math.inf:
            raise UserError(f"highest: got {highest}, but it must be above lowest ({lowest}), and both finite")
        check_at_least_one("max_tokens", max_tokens)
        if after is not None and (answer != "score" or not after.strip()):
            raise UserError(f"after: got {after!r}, but it is the text before the number of `answer: score`")
        self.url, self.model, self.question, self.answer = url.rstrip("/"), model, question, answer
        self.lowest, self.highest, self.api_key_env = lowest, highest, api_key_env
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.at_once, self.max_tokens, self.after = at_once, max_tokens, after
        self.range = (0.0, 1.0) if answer == "yes_no" else (lowest, highest)

    @staticmethod
    def permissions(options: Mapping[str, Any]) -> list[str]:
        """What the command line must allow: sending pictures and prompts to another machine, and a key to any."""
        return ChatEndpoint.permissions(str(options["url"]), options.get("api_key_env"))

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        rows = [{}] * len(prompts) if metadata is None else metadata
        questions = [fill_in(self.question, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        asked = list(zip(pictures(images), questions, strict=True))
        if self.answer == "yes_no":
            needed = "logprobs (if it has none, use `answer: score`)"
            scores = self._endpoint.ask(asked, lambda choice, _: self._probability(choice), LOGPROBS, needed=needed)
        else:
            scores = self._endpoint.ask(
                asked,
                lambda choice, number: self._number(choice["message"]["content"], questions[number]),
                {"max_tokens": self.max_tokens},
                needed="a message",
            )
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _probability(self, choice: Any) -> float:
        """P(yes) over P(yes) + P(no); tokens count whatever their case and the spaces and marks around them."""
        alternatives = first_token(choice)
        likelihood = {"yes": 0.0, "no": 0.0}
        for token, probability in alternatives:
            if word_of(token) in likelihood:
                likelihood[word_of(token)] += probability
        total = sum(likelihood.values())
        if not 0 < total < math.inf:
            tokens = ", ".join(repr(token)[:40] for token, _ in alternatives[:5])
            raise UserError(
                f"reward '{self.name}': neither yes nor no is among the {len(alternatives)} likeliest beginnings of "
                f"the answer ({tokens}, …); let `question` ask for yes or no and nothing else"
            )
        return likelihood["yes"] / total

    def _number(self, text: str, question: str) -> float:
        rest = text if self.after is None else text.rpartition(self.after)[2] if self.after in text else ""
        match = NUMBER.search(rest)
        if match is None or not self.lowest <= float(match.group()) <= self.highest:
            raise UserError(
                f"reward '{self.name}': expected a number from {self.lowest:g} to {self.highest:g}, but the answer to "
                f"'{short(question)}' was '{short(text)}'; let `question` ask for the number "
                + (f"after '{self.after}', and max_tokens leave room for it" if self.after else "and nothing else")
            )
        return float(match.group())
