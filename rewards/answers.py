"""How probable a vision-language model finds the expected answers to questions about pictures.

The score of an answer is Soft-TIFA's (arXiv 2512.16853): the probability that the reply begins with it, whatever its
case and the space before it, and for numbers as a word or in digits. Where an endpoint returns no log-probabilities, it
is 1 if the written answer begins with the expected one, else 0.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from agsm_rl_rewards.chat_endpoint import LOGPROBS, ChatEndpoint, first_token, short, word_of
from agsm_rl_rewards.question_list import NUMBERS, Question
from PIL import Image

from agsm_rl.errors import UserError

ScoreKind = Literal["auto", "soft", "hard"]
INSTRUCTION = "{question} Answer in one word."
"""GenEval 2's."""
WRITTEN = 16
"""Tokens of an answer that is read as text: a word, and what a model likes to put before it."""
SHORTEST_BEGINNING = 3
"""Letters of a token that counts as an answer's beginning where the answer is several tokens long."""
log = logging.getLogger(__name__)

Asked = tuple[Image.Image, Question]


class Answerer(Protocol):
    """A model that answers questions about pictures."""

    def scores(self, asked: Sequence[Asked]) -> list[float]:
        """The score in [0, 1] of each expected answer."""
        ...


class EndpointAnswerer:
    """A model behind an OpenAI-compatible endpoint. `kind`: soft scores, hard ones, or what the endpoint gives."""

    def __init__(self, endpoint: ChatEndpoint, kind: ScoreKind) -> None:
        self._endpoint, self._kind = endpoint, kind
        self._given: ScoreKind | None = None
        self._lock = threading.Lock()

    def scores(self, asked: Sequence[Asked]) -> list[float]:
        """See Answerer."""
        options = {"hard": {"max_tokens": WRITTEN}, "soft": LOGPROBS, "auto": LOGPROBS | {"max_tokens": WRITTEN}}
        needed = "logprobs (if it has none, use `scores: hard`)" if self._kind == "soft" else "a message"
        texts = [(picture, INSTRUCTION.replace("{question}", question.text)) for picture, question in asked]
        return self._endpoint.ask(
            texts, lambda choice, number: self._read(choice, asked[number][1]), options[self._kind], needed=needed
        )

    def _read(self, choice: Any, question: Question) -> float:
        kind = self._kind
        if kind == "auto":
            kind = self._settled("soft" if (choice.get("logprobs") or {}).get("content") else "hard")
        if kind == "hard":
            return float(begins_with(choice["message"]["content"], question))
        return min(1.0, sum(probability for token, probability in first_token(choice) if is_answer(token, question)))

    def _settled(self, kind: Literal["soft", "hard"]) -> ScoreKind:
        """The kind of the first reply, which all others must have."""
        with self._lock:
            if self._given is None:
                self._given = kind
                if kind == "hard":
                    log.warning("%s: the endpoint gives no logprobs; answers score 0 or 1", self._endpoint.who)
        if kind != self._given:
            raise self._endpoint.error(
                "gave logprobs with some replies and not with others; set `scores` to soft or hard"
            )
        return kind


class LocalAnswerer:
    """A model of transformers for images and text (`AutoModelForImageTextToText`), on this machine.

    Args:
        who: The reward, for messages.
        model: Folder or hub id.
        kind: `hard` scores 1 where the likeliest beginning is the expected answer, else 0; others are soft.
        dtype: Type of the weights; `auto` is the checkpoint's.
    """

    def __init__(self, who: str, model: str, kind: ScoreKind, dtype: str) -> None:
        self.who, self.model, self.kind, self.dtype = who, model, kind, dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @torch.no_grad()
    def scores(self, asked: Sequence[Asked]) -> list[float]:
        """See Answerer."""
        return [self._score(picture, question) for picture, question in asked]

    def prepare(self) -> None:
        """Load the model; UserError, with what to do, if it cannot be loaded."""
        assert self._loaded

    def _score(self, picture: Image.Image, question: Question) -> float:
        processor, model = self._loaded
        content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION.replace("{question}", question.text)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[picture], text=[text], return_tensors="pt").to(self.device, model.dtype)
        likely = model(**inputs).logits[0, -1].float().softmax(-1)
        tokens = self._tokens(question)
        if self.kind == "hard":
            return float(int(likely.argmax()) in tokens)
        return min(1.0, float(likely[sorted(tokens)].sum()))

    def _tokens(self, question: Question) -> set[int]:
        """The tokens with which the expected answer can begin."""
        tokenizer = self._loaded[0].tokenizer
        tokens = set()
        for form in question.forms:
            for written in (form, form.capitalize(), f" {form}", f" {form.capitalize()}"):
                first = tokenizer.encode(written, add_special_tokens=False)[0]
                # A space of its own begins any answer, and an unknown token is none.
                if first not in tokenizer.all_special_ids and tokenizer.decode([first]).strip():
                    tokens.add(first)
        return tokens

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(self.model)
            model = AutoModelForImageTextToText.from_pretrained(self.model, dtype=self.dtype)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(
                f"{self.who}: model '{self.model}' cannot be loaded ({short(error)}). Give the folder or hub id of a "
                f"model for images and text (`hf download {self.model}`), or `url`, the endpoint of a server with it"
            ) from error
        if processor.chat_template is None:
            raise UserError(f"{self.who}: model '{self.model}' has no chat template; give an instruction-tuned model")
        return processor, model.to(self.device).eval()


def is_answer(token: str, question: Question) -> bool:
    """Whether a reply that begins with this token begins with the expected answer."""
    word = word_of(token)
    if word in question.forms:
        return True
    # "seven" is an answer of its own, and does not begin "seventeen".
    is_number = word in NUMBERS or word.isdecimal()
    return len(word) >= SHORTEST_BEGINNING and not is_number and any(form.startswith(word) for form in question.forms)


def begins_with(text: str, question: Question) -> bool:
    """Whether a written reply begins with the expected answer as a word of its own."""
    said = " ".join(text.lower().split()).lstrip(" \"'*(")
    return any(said.startswith(form) and not said[len(form) : len(form) + 1].isalnum() for form in question.forms)
