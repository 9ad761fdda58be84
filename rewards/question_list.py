"""A prompt's questions with their expected answers, as the column `questions` of the prompts' file has them.

    {"prompt": "three red cats", "questions": [
        {"question": "Are there any cats?", "answer": "yes", "category": "object"},
        {"question": "How many cats are there?", "answer": "three", "category": "count", "requires": [0]}]}

A text is a question whose answer is yes. `requires` are the numbers of other questions: if one of them is answered
wrongly, this one counts as wrong too, as in DSG (arXiv 2310.18235) and DPG-Bench (arXiv 2403.05135).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agsm_rl.errors import UserError

COLUMN = "questions"
KEYS = ("question", "answer", "category", "requires")
MOST = 200
"""Questions of a prompt: benchmarks have up to some thirty."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
HOW = 'a list such as [{"question": "Are there any cats?", "answer": "yes", "category": "object"}]'


@dataclass(frozen=True)
class Question:
    """A question about an image, its expected answer, what kind of ability it asks for, and what must hold first."""

    text: str
    answer: str = "yes"
    category: str = ""
    requires: tuple[int, ...] = ()

    @property
    def forms(self) -> frozenset[str]:
        """The expected answer as it may be written: numbers up to ten as a word and in digits."""
        answer = self.answer.strip().lower()
        number = NUMBERS.index(answer) if answer in NUMBERS else int(answer) if answer in map(str, range(11)) else None
        return frozenset({answer} if number is None else {NUMBERS[number], str(number)})


def questions_of(metadata: Mapping[str, Any], where: str) -> list[Question]:
    """The questions of a prompt's row; a cell of a csv file holds them as JSON. UserError, with `where`, for others."""
    rows = metadata.get(COLUMN)
    if isinstance(rows, str):
        try:
            rows = json.loads(rows)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: its column '{COLUMN}' is not JSON ({error}); give {HOW}") from error
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST:
        have = ", ".join(metadata) or "no columns"
        raise UserError(
            f"{where}: it has no questions (it has {have}); give it a column '{COLUMN}', {HOW} of 1 to {MOST}. A "
            "benchmark's published file is converted by `python -m agsm_rl.evaluate.question_files`"
        )
    return [_question(row, number, len(rows), f"{where}: question {number}") for number, row in enumerate(rows)]


def counted(scores: Sequence[float], questions: Sequence[Question]) -> list[float]:
    """The scores in [0, 1] with 0 for questions whose `requires` do not hold: one of them scores below 1/2.

    As in DPG-Bench, questions are taken in order, and one that does not count makes those that require it not count.
    """
    counting = list(scores)
    for number, question in enumerate(questions):
        if any(counting[required] < 0.5 for required in question.requires):
            counting[number] = 0.0
    return counting


def joined(scores: Sequence[float], aggregate: str) -> float:
    """An image's score: the arithmetic mean of its questions' scores (`mean`), or their geometric mean."""
    if aggregate == "mean":
        return sum(scores) / len(scores)
    return 0.0 if min(scores) <= 0 else math.exp(sum(map(math.log, scores)) / len(scores))


def _question(row: Any, number: int, total: int, where: str) -> Question:
    if isinstance(row, str):
        row = {"question": row}
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: it is {row!r:.80}, but must be a text or a mapping; give {HOW}")
    given = {key: value for key, value in row.items() if value is not None}
    for key in given:
        if key not in KEYS:
            raise UserError(f"{where}: '{key}' is not a key of a question; allowed: {', '.join(KEYS)}")
    texts = {"question": "", "answer": "yes", "category": ""} | {key: given[key] for key in given if key != "requires"}
    for key, value in texts.items():
        if not isinstance(value, str) or (key != "category" and not value.strip()):
            raise UserError(f"{where}: its {key} is {value!r:.80}, but must be a text that is not empty")
    others = set(range(total)) - {number}
    requires = given.get("requires", [])
    if not isinstance(requires, list) or any(type(one) is not int or one not in others for one in requires):
        raise UserError(f"{where}: its `requires` is {requires!r:.80}, but must list other questions' numbers, from 0")
    return Question(texts["question"], texts["answer"], texts["category"], tuple(requires))
