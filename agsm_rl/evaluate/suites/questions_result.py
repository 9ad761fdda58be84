"""The figures of the suite `questions`: scores of images and prompts, and of answers by category.

As the benchmarks' authors do: a prompt's score joins its questions' answers (GenEval 2: the geometric mean; DPG-Bench:
the mean, without answers that what they require makes void), and a category's is the mean over its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from agsm_rl_rewards.question_list import Question, counted, joined
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.figures import change_json, interval_json, percent, plain_table
from agsm_rl.evaluate.intervals import Interval, mean_over_prompts, ratio_over_prompts
from agsm_rl.run.screen import styled

PROMPT_COLUMNS = ("category", "atom_count")
"""Columns by whose values prompts are grouped, where the file has them."""


@dataclass(frozen=True)
class Answers:
    """The answers to a prompt's questions about one image: `answers`, one score in [0, 1] per question."""

    prompt_index: int
    number: int
    prompt: str
    metadata: Mapping[str, Any]
    questions: Sequence[Question]
    answers: Sequence[float]

    def score(self, aggregate: str) -> float:
        """The image's score."""
        return joined(counted(self.answers, self.questions), aggregate)


@dataclass(frozen=True)
class QuestionsResult:
    """The answers about one target's images; `aggregate` joins those of an image."""

    rows: tuple[Answers, ...]
    aggregate: str

    def scores(self) -> dict[str, Interval]:
        """`overall`: the mean over prompts."""
        return {"overall": self.overall()}

    def per_image(self) -> dict[str, list[float]]:
        """The score of each image."""
        return {"overall": [row.score(self.aggregate) for row in self.rows]}

    def overall(self, aggregate: str | None = None) -> Interval:
        """The mean over prompts, with its interval over prompts."""
        return mean_over_prompts(list(self._by_prompt(aggregate or self.aggregate).values()))

    def by_category(self, name: Callable[[str], str] = str) -> dict[str, Interval]:
        """The mean of the answers in each category, with its interval over prompts; `name` may join categories."""
        return {category: ratio_over_prompts(*parts) for category, parts in self._sums(name).items()}

    def by_prompts(self) -> dict[str, dict[str, Interval]]:
        """{column: {value: score}} of the prompts with that value, for PROMPT_COLUMNS that there are."""
        scores = self._by_prompt(self.aggregate)
        metadata = {row.prompt_index: row.metadata for row in self.rows}
        figures: dict[str, dict[str, Interval]] = {}
        for column in PROMPT_COLUMNS:
            groups: dict[str, list[float]] = {}
            for index, score in scores.items():
                if isinstance(value := metadata[index].get(column), str | int):
                    groups.setdefault(str(value), []).append(score)
            figures |= {column: {value: mean_over_prompts(part) for value, part in groups.items()}} if groups else {}
        return figures

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json, with one row per category under `tags`."""
        overall, groups = self.overall(), self.by_category(_broad)
        number = {category: int(counts.sum()) for category, (_, counts) in self._sums(str).items()}
        content: dict[str, Any] = {
            "suite": "questions",
            "num_images": len(self.rows),
            "num_prompts": len({row.prompt_index for row in self.rows}),
            "aggregate": self.aggregate,
            "overall": overall.value,
            **{key: value for key, value in interval_json(overall).items() if key != "score"},
            "tags": {
                category: {"correct": None, "total": number[category], **interval_json(part)}
                for category, part in self.by_category().items()
            },
            "aggregates": {name: interval_json(self.overall(name)) for name in ("mean", "geometric")},
            "by_prompts": {
                column: {value: interval_json(part) for value, part in parts.items()}
                for column, parts in self.by_prompts().items()
            },
            "images": [self._image(row) for row in self.rows],
        }
        if set(groups) != set(content["tags"]):
            content["groups"] = {category: interval_json(part) for category, part in groups.items()}
        return content

    def show(
        self, console: Console, other: QuestionsResult | None = None, *, labels: tuple[str, str] = ("other", "this")
    ) -> None:
        """Print one row per category and the overall score; with `other`, both targets and the paired difference."""
        how = "geometric mean" if self.aggregate == "geometric" else "mean"
        table = plain_table(
            "questions, % of the expected answers, 95 % intervals over prompts",
            ("category", "n", *((*labels, "difference") if other else ("score",))),
        )
        sums, tags = self._sums(str), self.by_category()
        changes = self._tag_differences(other) if other else {}
        for category, part in tags.items():
            cells = [percent(part)]
            if other:
                before = other.by_category()[category].value
                cells = [f"{100 * before:.1f}", f"{100 * part.value:.1f}", percent(changes[category], "+")]
            table.add_row(styled(category or "–"), str(int(sums[category][1].sum())), *cells)
        table.add_section()
        cells = [percent(self.overall())]
        if other:
            values = (other.overall().value, self.overall().value)
            cells = [*(f"{100 * value:.1f}" for value in values), percent(self._difference(other), "+")]
        table.add_row(f"images ({how})", str(len(self.rows)), *cells, style="bold")
        console.print(table)

    def against(self, other: QuestionsResult) -> dict[str, Any]:
        """This target minus the other, overall and by category."""
        changes = self._tag_differences(other)
        overall = self._difference(other)
        return {
            "difference": {
                "overall": change_json(overall),
                "tags": {category: change_json(part) for category, part in changes.items()},
            }
        }

    def _image(self, row: Answers) -> dict[str, Any]:
        answers = [
            {"question": question.text, "answer": question.answer, "category": question.category, "score": score}
            for question, score in zip(row.questions, row.answers, strict=True)
        ]
        return {"prompt": row.prompt, "scores": {"overall": row.score(self.aggregate)}, "answers": answers}

    def _by_prompt(self, aggregate: str) -> dict[int, float]:
        """The mean score of each prompt's images."""
        scores: dict[int, list[float]] = {}
        for row in self.rows:
            scores.setdefault(row.prompt_index, []).append(row.score(aggregate))
        return {index: float(np.mean(values)) for index, values in scores.items()}

    def _sums(self, name: Callable[[str], str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each category the sums and the numbers of its answers, prompt by prompt."""
        places = {index: place for place, index in enumerate(dict.fromkeys(row.prompt_index for row in self.rows))}
        sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for row in self.rows:
            for question, score in zip(row.questions, row.answers, strict=True):
                empty = (np.zeros(len(places)), np.zeros(len(places)))
                total, count = sums.setdefault(name(question.category), empty)
                total[places[row.prompt_index]] += score
                count[places[row.prompt_index]] += 1
        return sums

    def _difference(self, other: QuestionsResult) -> Interval:
        self._check_paired(other)
        ours, theirs = self._by_prompt(self.aggregate), other._by_prompt(self.aggregate)
        return mean_over_prompts([ours[index] - theirs[index] for index in ours])

    def _tag_differences(self, other: QuestionsResult) -> dict[str, Interval]:
        self._check_paired(other)
        ours, theirs = self._sums(str), other._sums(str)
        return {
            category: ratio_over_prompts(total - theirs[category][0], count)
            for category, (total, count) in ours.items()
        }

    def _check_paired(self, other: QuestionsResult) -> None:
        if self._asked() != other._asked():
            raise UserError(
                "the two targets' images differ in prompts, questions or number, so they cannot be paired; draw both "
                "with the same --prompts and --num-images."
            )

    def _asked(self) -> dict[tuple[int, int], tuple[str, tuple[Question, ...]]]:
        return {(row.prompt_index, row.number): (row.prompt, tuple(row.questions)) for row in self.rows}


def _broad(category: str) -> str:
    """The category before the dash: "attribute" of "attribute - color"."""
    return category.partition("-")[0].strip()
