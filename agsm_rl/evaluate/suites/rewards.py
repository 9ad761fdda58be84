"""The rewards suite: any rewards on any prompts. Reports means, and win rates against another target on the same noise.

Means have bootstrap intervals over prompts, after averaging the images of each prompt. Every reward has its own scale,
so only differences between targets are meaningful; win rates can be compared across rewards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.figures import change_json, interval_json, number, percent, plain_table
from agsm_rl.evaluate.intervals import Interval, mean_over_prompts, win_rate
from agsm_rl.evaluate.prompts import PromptList
from agsm_rl.evaluate.suite import Judged, Metadata, Part, Row, Suite, batches_of_one_size
from agsm_rl.interfaces import ChecksPrompts, Reward
from agsm_rl.recipe.earlier import reward_of_today
from agsm_rl.recipe.options import NumImages
from agsm_rl.recipe.reward_specs import RewardSpec
from agsm_rl.run.screen import styled, tell
from agsm_rl.training.scoring import checked_score, scoring_device


@dataclass(frozen=True)
class RewardsResult:
    """One target's scores.

    Attributes:
        scores_by_prompt: The scores of a prompt's images, by reward and prompt number.
        prompts: The prompts' texts by number.
        weights: The rewards' weights in `overall`.
        filenames: The files of a prompt's images by number, if they were kept.
    """

    scores_by_prompt: Mapping[str, Mapping[int, Sequence[float]]]
    prompts: Mapping[int, str]
    weights: Mapping[str, float]
    filenames: Mapping[int, Sequence[str]] = field(default_factory=dict)

    def scores(self) -> dict[str, Interval]:
        """Each reward's mean."""
        return {label: self.mean(label) for label in self.scores_by_prompt}

    def per_image(self) -> dict[str, list[float]]:
        """Each reward's scores, image by image."""
        return {
            label: [score for values in by_prompt.values() for score in values]
            for label, by_prompt in self.scores_by_prompt.items()
        }

    def mean(self, label: str) -> Interval:
        """A reward's mean, with its interval over prompts."""
        return mean_over_prompts([float(np.mean(scores)) for scores in self.scores_by_prompt[label].values()])

    def overall(self) -> Interval:
        """The weighted sum of the rewards, as a run with these weights is trained on."""
        return mean_over_prompts(list(self._weighted().values()))

    def constant(self) -> list[str]:
        """Rewards that gave every image the same score despite several prompts, and so measured nothing."""
        if len(self.prompts) < 2:
            return []
        values = {label: np.concatenate(list(by_prompt.values())) for label, by_prompt in self.scores_by_prompt.items()}
        return [label for label, scores in values.items() if np.ptp(scores) <= 1e-6 * np.abs(scores).max()]

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json, with one row per reward under `tags`."""
        tags = {}
        for label, scores in self.scores_by_prompt.items():
            total = sum(len(values) for values in scores.values())
            tags[label] = {"correct": None, "total": total, **interval_json(self.mean(label))}
        overall = self.overall()
        first = next(iter(self.scores_by_prompt.values()))
        return {
            "suite": "rewards",
            "num_images": sum(len(values) for values in first.values()),
            "num_prompts": len(self.prompts),
            "overall": overall.value,
            **{key: value for key, value in interval_json(overall).items() if key != "score"},
            "tags": tags,
            "weights": dict(self.weights),
            "constant": self.constant(),
            "images": [
                {
                    "prompt": prompt,
                    "scores": {label: list(self.scores_by_prompt[label][index]) for label in self.scores_by_prompt},
                    **({"filenames": list(self.filenames[index])} if index in self.filenames else {}),
                }
                for index, prompt in self.prompts.items()
            ],
        }

    def scores_by_image(self) -> list[dict[str, float]]:
        """{reward: score} of each image, in the order of the prompts."""
        first = next(iter(self.scores_by_prompt.values()))
        places = [(index, number) for index, values in first.items() for number in range(len(values))]
        return [
            {label: by_prompt[index][number] for label, by_prompt in self.scores_by_prompt.items()}
            for index, number in places
        ]

    def show(
        self, console: Console, other: RewardsResult | None = None, *, labels: tuple[str, str] = ("other", "this")
    ) -> None:
        """Print one row per reward; with `other`, also its mean, the paired difference and the win rate in percent."""
        columns = (*labels, "difference", "wins %") if other else ("mean",)
        table = plain_table(
            f"rewards on {len(self.prompts)} prompts, 95 % intervals over prompts", ("reward", *columns)
        )
        for label in self.scores_by_prompt:
            cells = [number(self.mean(label))]
            if other:
                change, wins = self._compared(other, label)
                cells = [f"{other.mean(label).value:.4g}", f"{self.mean(label).value:.4g}", number(change, "+")]
                cells.append(percent(wins))
            table.add_row(styled(label), *cells)
        console.print(table)
        for label in self.constant():
            tell(console, f"{label} gave every image the same score; it measures nothing here.", style="red")

    def against(self, other: RewardsResult) -> dict[str, Any]:
        """This target minus the other, and how often this one wins, by reward."""
        by_reward = {}
        for label in self.scores_by_prompt:
            change, wins = self._compared(other, label)
            by_reward[label] = {"difference": change_json(change), "win_rate": interval_json(wins)}
        weighted, theirs = self._weighted(), other._weighted()
        overall = mean_over_prompts([weighted[index] - theirs[index] for index in weighted])
        return {"difference": {"overall": change_json(overall)}, "rewards": by_reward}

    def _compared(self, other: RewardsResult, label: str) -> tuple[Interval, Interval]:
        ours, theirs = self.scores_by_prompt[label], other.scores_by_prompt[label]
        same = self.prompts == other.prompts and all(len(ours[i]) == len(theirs[i]) for i in ours)
        if not same:
            raise UserError(
                "the two targets' images differ in prompts or number, so they cannot be paired; draw both with the "
                "same --prompts and --num-images."
            )
        changes = [float(np.mean(ours[index]) - np.mean(theirs[index])) for index in ours]
        return mean_over_prompts(changes), win_rate(list(ours.values()), [theirs[index] for index in ours])

    def _weighted(self) -> dict[int, float]:
        return {
            index: sum(
                self.weights[label] * float(np.mean(self.scores_by_prompt[label][index]))
                for label in self.scores_by_prompt
            )
            for index in self.prompts
        }


class Rewards(Suite):
    """Any rewards on any prompts.

    Args:
        rewards: The rewards to measure by name: `{name: {options…}}`. A `weight` counts in `overall` only.
        prompts: The prompts to draw: a text file (one prompt per line), a table (.jsonl, .csv, .tsv, .parquet), a
            folder or a name on the hub that holds one, or `builtin:shapes-prompts`. Their other columns reach rewards
            that take `metadata`.
        prompt_column: The column that holds the prompts.
        prompt_split: The data set's split; of a list `builtin:…-prompts`, by default the evaluation's.
        num_images: How many images to draw: of the first so many prompts, or several of each. Null: one of each.
    """

    name = "rewards"
    only_draws = frozenset({"seed", "prompts", "prompt_column", "prompt_split"})

    def __init__(
        self,
        *,
        rewards: Sequence[RewardSpec],
        prompts: str | None = None,
        prompt_column: str | None = None,
        prompt_split: str | None = None,
        num_images: NumImages | None = None,
    ) -> None:
        self.specs = list(rewards)
        self.list = PromptList(prompts, prompt_column, prompt_split, num_images)

    @property
    def num_images(self) -> int:  # type: ignore[override]
        """The number given, or one image of each prompt."""
        return self.list.num_images

    @cached_property
    def _models(self) -> dict[str, Reward]:
        return {spec.label: spec.make() for spec in self.specs}

    def score_names(self) -> Sequence[str]:
        """The rewards' names."""
        return [spec.label for spec in self.specs]

    def prompts(self) -> Mapping[int, Metadata]:
        """The prompts; UserError if there are none."""
        if self.list.prompts is None:
            raise UserError("suite rewards: no prompts; give a file or a data set as `prompts` (--prompts).")
        return self.list.read()

    def prepare(self) -> None:
        """Construct the rewards."""
        assert self._models

    def check(self, metadata: Metadata) -> None:
        """UserError if a prompt's row lacks what one of the rewards judges by."""
        for spec in self.specs:
            if isinstance(reward := self._models[spec.label], ChecksPrompts):
                reward.check_prompts([str(metadata["prompt"])], [_columns(metadata)])

    def how(self) -> Mapping[str, Any]:
        """Every reward with its options."""
        return {spec.label: _how(spec) for spec in self.specs}

    def parts(self) -> Sequence[Part]:
        """Each reward by itself, so that another one can be added."""
        return [
            Part(_folder(spec), _how(spec), partial(self._score, spec), partial(_of_today, spec)) for spec in self.specs
        ]

    def join(self, rows: Sequence[Row]) -> Row:
        """{reward: score}."""
        return {spec.label: float(row) for spec, row in zip(self.specs, rows, strict=True)}

    def judge(self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Row]:
        """{reward: score} of each picture."""
        scores = [self._score(spec, images, prompts, metadata) for spec in self.specs]
        return [self.join(row) for row in zip(*scores, strict=True)]

    def result(self, judged: Sequence[Judged]) -> RewardsResult:
        """Means over prompts, and what they are made of."""
        scores: dict[str, dict[int, list[float]]] = {spec.label: {} for spec in self.specs}
        for item in judged:
            for label, by_prompt in scores.items():
                by_prompt.setdefault(item.prompt_index, []).append(float(item.row[label]))
        prompts = {item.prompt_index: item.prompt for item in judged}
        files: dict[int, list[str]] = {}
        for item in judged:
            if item.filename is not None:
                files.setdefault(item.prompt_index, []).append(item.filename)
        return RewardsResult(scores, prompts, {spec.label: spec.weight for spec in self.specs}, files)

    def _score(
        self, spec: RewardSpec, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[float]:
        """A reward's score of each picture; pictures of one size are scored together."""
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images]
        columns = [_columns(row) for row in metadata]
        scores = [0.0] * len(tensors)
        for part in batches_of_one_size([tuple(tensor.shape) for tensor in tensors], len(tensors)):
            stacked = torch.stack([tensors[index] for index in part]).to(scoring_device())
            rows, asked = [columns[index] for index in part], [prompts[index] for index in part]
            found = checked_score(self._models[spec.label], stacked, asked, name=spec.key, metadata=rows)
            for index, score in zip(part, found.tolist(), strict=True):
                scores[index] = score
        return scores


def _columns(metadata: Metadata) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != "prompt"}


def _how(spec: RewardSpec) -> dict[str, Any]:
    return {"reward": spec.name, "options": dict(spec.complete)}


def _of_today(spec: RewardSpec, how: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"reward": how["reward"], "options": reward_of_today(how["reward"], how["options"], spec.parts)}


def _folder(spec: RewardSpec) -> str:
    """The name of the folder for a reward's scores: readable, and unique to its options."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", spec.label).strip("-.")
    tail = "" if plain == spec.label else "-" + hashlib.sha256(spec.label.encode()).hexdigest()[:8]
    return f"reward-{plain[:60]}{tail}"
