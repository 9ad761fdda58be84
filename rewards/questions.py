"""`questions`: questions about an image with expected answers, asked of a vision-language model.

The prompts' file has a column `questions` (question_list.py). Scores are Soft-TIFA's, which GenEval 2 uses (arXiv
2512.16853): the probabilities of the expected answers (answers.py), joined by their arithmetic or geometric mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from agsm_rl_rewards.answers import Answerer, EndpointAnswerer, LocalAnswerer, ScoreKind
from agsm_rl_rewards.chat_endpoint import ChatEndpoint
from agsm_rl_rewards.preprocessing import pictures
from agsm_rl_rewards.question_list import Question, counted, joined, questions_of
from PIL import Image
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

Aggregate = Literal["mean", "geometric"]
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Questions:
    """Scores [B] in [0, 1]: how probable a vision-language model finds the expected answers to a prompt's questions.

    Raises UserError if a prompt has no questions, or if an image cannot be scored: a score is never made up.

    Args:
        model: With `url`, the model's name at the endpoint; else a folder or hub id of a transformers model for images
            and text, run on this machine.
        url: Base URL of an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1. Null runs the model here.
        aggregate: How an image's questions are joined: their arithmetic `mean`, or the `geometric` mean, which one
            wrong answer brings near 0.
        scores: `soft`: probabilities of the expected answers, for which an endpoint must return logprobs; `hard`: 1 if
            the answer is the expected one, else 0. `auto` is soft wherever there are probabilities.
        api_key_env: The environment variable that holds the endpoint's key, never the key itself. A recipe may send it
            only with `--allow-env` on the command line.
        timeout: Seconds for one try, from connecting to the end of the answer.
        retries: Further tries, `backoff` · 1, 2, 4, … seconds apart, or as the server asks; at most 60 s.
        backoff: Seconds before the first further try.
        at_once: Number of requests sent at the same time.
        dtype: Type of a local model's weights; `auto` is the checkpoint's.
    """

    name = "questions"
    range = (0.0, 1.0)
    licence = "the model's own"
    differentiable = False
    elsewhere = False
    takes_metadata = True

    def __init__(
        self,
        *,
        model: str,
        url: str | None = None,
        aggregate: Aggregate = "mean",
        scores: ScoreKind = "auto",
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        at_once: int = 8,
        dtype: str = "auto",
    ) -> None:
        for name, value, allowed in (
            ("aggregate", aggregate, get_args(Aggregate)),
            ("scores", scores, get_args(ScoreKind)),
            ("dtype", dtype, DTYPES),
        ):
            if value not in allowed:
                raise unknown_name(name, value, "a choice", allowed)
        self.model, self.url, self.aggregate = model, url, aggregate
        self.scores, self.dtype, self.api_key_env = scores, dtype, api_key_env
        self.timeout, self.retries, self.backoff, self.at_once = timeout, retries, backoff, at_once
        self.elsewhere = url is not None
        self._answerer: Answerer
        if url is None:
            if api_key_env is not None:
                raise UserError("api_key_env: a model on this machine needs no key; give `url`, or leave the key out")
            self._answerer = LocalAnswerer(f"reward '{self.name}'", model, scores, dtype)
        else:
            how: dict[str, Any] = {"timeout": timeout, "retries": retries, "backoff": backoff, "at_once": at_once}
            endpoint = ChatEndpoint(f"reward '{self.name}'", url=url, model=model, api_key_env=api_key_env, **how)
            self._answerer = EndpointAnswerer(endpoint, scores)

    @staticmethod
    def permissions(options: Mapping[str, Any]) -> list[str]:
        """What the command line must allow: sending pictures and questions to another machine, and a key to any."""
        if options.get("url") is None:
            return []
        return ChatEndpoint.permissions(str(options["url"]), options.get("api_key_env"))

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """UserError, naming the prompt, if one has no questions or they cannot be read."""
        self._questions(prompts, metadata)

    def prepare(self) -> None:
        """Load a local model; an endpoint is not asked."""
        if isinstance(self._answerer, LocalAnswerer):
            self._answerer.prepare()

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]; `metadata` holds each prompt's questions."""
        questions = self._questions(prompts, [{}] * len(prompts) if metadata is None else metadata)
        answers = self.answers(pictures(images), questions)
        scores = [joined(counted(*pair), self.aggregate) for pair in zip(answers, questions, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def answers(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Question]]) -> list[list[float]]:
        """The score of each question about each image, without regard to what it requires."""
        asked = [(image, one) for image, of_image in zip(images, questions, strict=True) for one in of_image]
        scores = iter(self._answerer.scores(asked))
        return [[next(scores) for _ in of_image] for of_image in questions]

    def _questions(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[list[Question]]:
        return [
            questions_of(row, f"reward '{self.name}': the prompt '{prompt:.200}'")
            for prompt, row in zip(prompts, metadata, strict=True)
        ]
