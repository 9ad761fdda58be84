"""The rewards suite: any rewards on any prompts. Reports means, and win rates against another target on the same noise.

Means have bootstrap intervals over prompts, after averaging the images of each prompt. Every reward has its own scale,
so only differences between targets are meaningful; win rates can be compared across rewards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.evaluate.figures import change_json, interval_json, number, percent, plain_table
from agsm_rl.evaluate.image_folder import Drawn, Measurements, open_picture
from agsm_rl.evaluate.intervals import Interval, mean_over_prompts, win_rate
from agsm_rl.files import read_text
from agsm_rl.interfaces import Reward
from agsm_rl.recipe.earlier import reward_of_today
from agsm_rl.recipe.options import validated
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.rewards import in_evaluation
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.recipe.yaml_file import parse_yaml
from agsm_rl.run.screen import styled, tell
from agsm_rl.training.scoring import checked_score, scoring_device

NUM_IMAGES = 200
MAX_BYTES = 1_000_000
"""Largest size of a rewards file."""


@dataclass(frozen=True)
class RewardSpec:
    """A requested reward: registered name, given options, weight in `overall`, and all options with defaults."""

    name: str
    options: Mapping[str, Any]
    weight: float
    complete: Mapping[str, Any]

    @property
    def label(self) -> str:
        """hpsv2, or hpsv2:version=2.1 if there are options."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def parse_rewards(
    given: Sequence[str], file: Path | None = None, *, allow_imports: Collection[str] = ()
) -> list[RewardSpec]:
    """Parse `NAME` or `NAME:option=value,…`, and a YAML file of {name: weight} or {name: {weight, options…}}.

    UserError for an unknown name or option (with the nearest match), or if there is no reward.
    """
    parts = Parts(where="--reward", allow_imports=allow_imports)
    specs = [_parse(text, parts) for text in given]
    if file is not None:
        specs += _read_yaml(file, Parts(where=str(file), allow_imports=allow_imports))
    if not specs:
        raise UserError("--suite rewards: no reward given; name one or more, e.g. --reward jpeg_compressibility.")
    labels = [spec.label for spec in specs]
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise UserError(f"--reward {repeated[0]}: is listed twice; list each reward once.")
    return specs


def rewards_of(evaluate: Evaluate, *, where: str, allow_imports: Collection[str] = ()) -> list[RewardSpec]:
    """The rewards that a run's recipe evaluates; each counts once in `overall`, under whatever name it has there."""
    parts = Parts(where=f"{where}: evaluate.rewards", allow_imports=allow_imports)
    specs = [_spec(entry.use, entry.options, 1.0, parts) for entry in in_evaluation(evaluate.rewards)]
    return list({spec.label: spec for spec in specs}.values())


@dataclass(frozen=True)
class RewardsResult:
    """One target's scores.

    Attributes:
        scores: The scores of a prompt's images, by reward and prompt number.
        prompts: The prompts' texts by number.
        weights: The rewards' weights in `overall`.
    """

    scores: Mapping[str, Mapping[int, Sequence[float]]]
    prompts: Mapping[int, str]
    weights: Mapping[str, float]

    def mean(self, label: str) -> Interval:
        """A reward's mean, with its interval over prompts."""
        return mean_over_prompts([float(np.mean(scores)) for scores in self.scores[label].values()])

    def overall(self) -> Interval:
        """The weighted sum of the rewards, as a run with these weights is trained on."""
        return mean_over_prompts(list(self._weighted().values()))

    def constant(self) -> list[str]:
        """Rewards that gave every image the same score despite several prompts, and so measured nothing."""
        if len(self.prompts) < 2:
            return []
        values = {label: np.concatenate(list(by_prompt.values())) for label, by_prompt in self.scores.items()}
        return [label for label, scores in values.items() if np.ptp(scores) <= 1e-6 * np.abs(scores).max()]

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json, with one row per reward under `tags`."""
        tags = {}
        for label, scores in self.scores.items():
            total = sum(len(values) for values in scores.values())
            tags[label] = {"correct": None, "total": total, **interval_json(self.mean(label))}
        overall = self.overall()
        first = next(iter(self.scores.values()))
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
                {"prompt": prompt, "scores": {label: list(self.scores[label][index]) for label in self.scores}}
                for index, prompt in self.prompts.items()
            ],
        }

    def show(self, console: Console, other: RewardsResult | None = None) -> None:
        """Print one row per reward; with `other`, also its mean, the paired difference and the win rate in percent."""
        columns = ("other", "this", "difference", "wins %") if other else ("mean",)
        table = plain_table(
            f"rewards on {len(self.prompts)} prompts, 95 % intervals over prompts", ("reward", *columns)
        )
        for label in self.scores:
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
        for label in self.scores:
            change, wins = self._compared(other, label)
            by_reward[label] = {"difference": change_json(change), "win_rate": interval_json(wins)}
        weighted, theirs = self._weighted(), other._weighted()
        overall = mean_over_prompts([weighted[index] - theirs[index] for index in weighted])
        return {"difference": {"overall": change_json(overall)}, "rewards": by_reward}

    def _compared(self, other: RewardsResult, label: str) -> tuple[Interval, Interval]:
        ours, theirs = self.scores[label], other.scores[label]
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
            index: sum(self.weights[label] * float(np.mean(self.scores[label][index])) for label in self.scores)
            for index in self.prompts
        }


class Rewards:
    """The suite. `prompts` is metadata by number (`prompts.read_prompts`); scores are stored beside the images."""

    name = "rewards"

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        prompts: Mapping[int, Mapping[str, Any]],
        *,
        allow_imports: Collection[str] = (),
    ) -> None:
        self.specs, self.prompts, self.num_images = list(specs), prompts, len(prompts)
        self._allow_imports = allow_imports
        self._kept = {
            spec.label: Measurements(
                _folder(spec), {"reward": spec.name, "options": dict(spec.complete)}, of_today=self._of_today
            )
            for spec in specs
        }

    def _of_today(self, how: Mapping[str, Any]) -> Mapping[str, Any]:
        parts = Parts(where="--reward", allow_imports=self._allow_imports)
        return {"reward": how["reward"], "options": reward_of_today(how["reward"], how["options"], parts)}

    @cached_property
    def _models(self) -> dict[str, Reward]:
        parts = Parts(where="--reward", allow_imports=self._allow_imports)
        return {spec.label: parts.reward(spec.name, spec.label, dict(spec.complete)) for spec in self.specs}

    def asked(self) -> Mapping[int, Mapping[str, Any]]:
        """The prompts; UserError if there are none."""
        if not self.prompts:
            raise UserError("--suite rewards: no prompts; give a file or a data set with --prompts.")
        return self.prompts

    def prepare(self) -> None:
        """Construct the rewards."""
        assert self._models

    def check(self, images: Sequence[Drawn]) -> None:
        """Accepts any image that has a prompt."""

    def pending(self, images: Sequence[Drawn]) -> list[Drawn]:
        """The images that lack a score of some reward."""
        return [item for item in images if any(kept.read(item.path) is None for kept in self._kept.values())]

    def measure(self, images: Sequence[Drawn]) -> None:
        """Score the images by the rewards that have not scored them yet, in batches of equal size."""
        for label, kept in self._kept.items():
            unscored = [item for item in images if kept.read(item.path) is None]
            for part in _by_size([(item, _tensor(item)) for item in unscored]):
                stacked = torch.stack([image for _, image in part]).to(scoring_device())
                columns = [{key: value for key, value in item.metadata.items() if key != "prompt"} for item, _ in part]
                prompts = [item.prompt for item, _ in part]
                scores = checked_score(self._models[label], stacked, prompts, metadata=columns)
                for (item, _), score in zip(part, scores.tolist(), strict=True):
                    kept.write(item.path, score)

    def result(self, images: Sequence[Drawn]) -> RewardsResult:
        """The result, computed from the stored scores."""
        scores: dict[str, dict[int, list[float]]] = {}
        for label, kept in self._kept.items():
            by_prompt: dict[int, list[float]] = {}
            for item in images:
                score = kept.read(item.path)
                if score is None:
                    raise UserError(f"{item.path}: has no score yet; run the evaluation again to the end.")
                by_prompt.setdefault(item.prompt_index, []).append(float(score))
            scores[label] = by_prompt
        prompts = {item.prompt_index: item.prompt for item in images}
        return RewardsResult(scores, prompts, {spec.label: spec.weight for spec in self.specs})


def _parse(text: str, parts: Parts) -> RewardSpec:
    """`name`, `name:key=value,…`, `module:Class` or `module:Class:key=value,…`."""
    parted = re.fullmatch(
        r"(.*?):(\w+=.*)", text, re.DOTALL
    )  # split at the first colon before an option: a URL has more
    name, listed = parted.groups() if parted else (text, "")
    options: dict[str, Any] = {}
    for piece in filter(None, listed.split(",")):
        key, equals, value = piece.partition("=")
        if not equals:
            raise UserError(f"--reward {text}: '{piece}' is not an option; write NAME:option=value,option=value.")
        # The constructor's types turn text into numbers; only null, lists and mappings are read as YAML.
        is_yaml = value in ("null", "none") or value[:1] in "[{"
        options[key] = parse_yaml(value, where=f"--reward {text:.200}: {key}") if is_yaml else value
    return _spec(name, options, 1.0, parts)


def _read_yaml(file: Path, parts: Parts) -> list[RewardSpec]:
    content = parse_yaml(read_text(file, max_bytes=MAX_BYTES), where=str(file))
    content = content.get("rewards", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: must map reward names to options, e.g. `hpsv2: {{weight: 1.0, version: '2.1'}}`.")
    specs = []
    for name, value in content.items():
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"{file}: {name}: the weight is {weight!r}; give a number, or {{weight: 1.0, option: …}}.")
        specs.append(_spec(str(name), options, float(weight), parts))
    return specs


def _spec(name: str, options: dict[str, Any], weight: float, parts: Parts) -> RewardSpec:
    """The reward with its options converted to the constructor's types and completed with its defaults."""
    complete = validated(parts.load("rewards", name, name), options, where=f"{parts.where}: {name}")
    return RewardSpec(name, {key: complete[key] for key in options}, weight, complete)


def _folder(spec: RewardSpec) -> str:
    """The name of the folder for a reward's scores: readable, and unique to its options."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", spec.label).strip("-.")
    tail = "" if plain == spec.label else "-" + hashlib.sha256(spec.label.encode()).hexdigest()[:8]
    return f"reward-{plain[:60]}{tail}"


def _tensor(item: Drawn) -> Tensor:
    return torch.from_numpy(np.array(open_picture(item.path))).permute(2, 0, 1).float() / 255


def _by_size(images: Sequence[tuple[Drawn, Tensor]]) -> list[list[tuple[Drawn, Tensor]]]:
    groups: dict[tuple[int, ...], list[tuple[Drawn, Tensor]]] = {}
    for item, image in images:
        groups.setdefault(tuple(image.shape), []).append((item, image))
    return list(groups.values())
