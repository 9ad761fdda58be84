"""The questions suite: questions with expected answers about each image, asked of a vision-language model.

The prompts' file has a column `questions`, or is a benchmark's published file: of GenEval 2 (arXiv 2512.16853), whose
Soft-TIFA this is, of DPG-Bench (arXiv 2403.05135), or of UniGenBench (arXiv 2508.20751). The reward `questions` asks
the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

from agsm_rl_rewards.answers import INSTRUCTION, ScoreKind
from agsm_rl_rewards.question_list import COLUMN, Question, questions_of
from agsm_rl_rewards.questions import Aggregate
from agsm_rl_rewards.questions import Questions as QuestionsReward
from PIL.Image import Image

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.evaluate.prompts import PromptList
from agsm_rl.evaluate.question_files import read_question_file
from agsm_rl.evaluate.suite import Judged, Metadata, Row, Suite
from agsm_rl.evaluate.suites.questions_result import Answers, QuestionsResult
from agsm_rl.recipe.options import NumImages

Form = Literal["geneval2", "dpg_bench", "unigenbench"]
AGGREGATES: dict[str, Aggregate] = {"geneval2": "geometric"}
"""How benchmarks join an image's answers, where that is not the mean."""


class Questions(Suite):
    """How probable a vision-language model finds the expected answers to questions about each image.

    Args:
        model: With `url`, the model's name at the endpoint; else a folder or hub id of a transformers model for images
            and text, run on this machine.
        prompts: The prompts to draw, a table with a column `questions`, or with `form` a benchmark's published file.
        form: `geneval2`, `dpg_bench` or `unigenbench`: the file is as that benchmark's authors publish it. Null: it has
            a column `questions`.
        prompt_column: The column that holds the prompts.
        prompt_split: The data set's split; of a list `builtin:…-prompts`, by default the evaluation's.
        num_images: How many images to draw: of the first so many prompts, or several of each. Null: one of each.
        url: Base URL of an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1. Null runs the model here.
        aggregate: How an image's answers are joined: their `mean`, or their `geometric` mean. Null: geometric for
            `geneval2`, else the mean.
        scores: `soft`: probabilities of the expected answers, for which an endpoint must return logprobs; `hard`: 1 if
            the answer is the expected one, else 0. `auto` is soft wherever there are probabilities.
        api_key_env: The environment variable that holds the endpoint's key, never the key itself.
        timeout: Seconds for one try, from connecting to the end of the answer.
        retries: Further tries, `backoff` · 1, 2, 4, … seconds apart, or as the server asks; at most 60 s.
        backoff: Seconds before the first further try.
        at_once: Number of requests sent at the same time.
        dtype: Type of a local model's weights; `auto` is the checkpoint's.
    """

    name = "questions"
    only_draws = frozenset({"seed", "prompts", "prompt_column", "prompt_split"})

    def __init__(
        self,
        *,
        model: str,
        prompts: str | None = None,
        form: Form | None = None,
        prompt_column: str | None = None,
        prompt_split: str | None = None,
        num_images: NumImages | None = None,
        url: str | None = None,
        aggregate: Aggregate | None = None,
        scores: ScoreKind = "auto",
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        at_once: int = 8,
        dtype: str = "auto",
    ) -> None:
        if form is not None and form not in get_args(Form):
            raise unknown_name("form", form, "a form of questions", get_args(Form))
        if form is not None and (prompt_column or prompt_split):
            raise UserError(f"form: a {form} file has its own columns; leave out prompt_column and prompt_split")
        self.form, self.list = form, PromptList(prompts, prompt_column, prompt_split, num_images)
        self.aggregate = aggregate or AGGREGATES.get(form or "", "mean")
        self.asking = QuestionsReward(
            model=model,
            url=url,
            aggregate=self.aggregate,
            scores=scores,
            api_key_env=api_key_env,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            at_once=at_once,
            dtype=dtype,
        )

    permissions = staticmethod(QuestionsReward.permissions)

    @property
    def num_images(self) -> int:  # type: ignore[override]
        """The number given, or one image of each prompt."""
        return self.list.num_given or (len(self._rows) if self.list.prompts is not None else 0)

    def prompts(self) -> Mapping[int, Metadata]:
        """The prompts with their questions; UserError if there are none, or they cannot be read."""
        if self.list.prompts is None:
            raise UserError(
                f"suite questions: no prompts; give a table with a column `{COLUMN}`, or a benchmark's file and its "
                "`form`, as `prompts` (--prompts)."
            )
        return self._rows

    @cached_property
    def _rows(self) -> dict[int, Metadata]:
        rows: dict[int, Metadata]
        if self.form is None:
            rows = dict(self.list.read())
        else:
            read = read_question_file(self.form, str(self.list.prompts), where=self.list.where)
            rows = dict(enumerate(read[: self.list.num_given]))
        for row in rows.values():
            questions_of(row, f"{self.list.where} '{self.list.prompts}': the prompt '{row['prompt']:.200}'")
        return rows

    def prepare(self) -> None:
        """Load a local model."""
        self.asking.prepare()

    def check(self, metadata: Metadata) -> None:
        """UserError unless a prompt has questions."""
        _questions(metadata)

    def how(self) -> Mapping[str, Any]:
        """The model, where it runs, and how it is asked."""
        asking = self.asking
        return {
            "model": asking.model,
            "url": asking.url,
            "dtype": asking.dtype if asking.url is None else None,
            "scores": asking.scores,
            "instruction": INSTRUCTION,
        }

    def judge(self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Row]:
        """The scores of each picture's answers, in the order of its questions."""
        return self.asking.answers(images, [_questions(row) for row in metadata])

    def result(self, judged: Sequence[Judged]) -> QuestionsResult:
        """The answers with their questions."""
        rows = [
            Answers(
                item.prompt_index,
                item.number,
                item.prompt,
                item.metadata,
                _questions(item.metadata),
                item.row,
            )
            for item in judged
        ]
        return QuestionsResult(tuple(rows), self.aggregate)


def _questions(metadata: Metadata) -> list[Question]:
    return questions_of(metadata, f"the prompt '{metadata['prompt']:.200}'")
