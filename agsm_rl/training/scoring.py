"""Scoring images with rewards. A reward must return one finite number per image."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import ChecksPrompts, Reward, TakesMetadata
from agsm_rl.registry import load
from agsm_rl.training.defaults import with_defaults
from agsm_rl.training.in_flight import InFlight
from agsm_rl.training.precision import own_precision
from agsm_rl.training.stages import stage
from agsm_rl.training.user_code import user_code

Normalise = Literal["raw", "z_score"]
Rows = Sequence[Mapping[str, Any]]
"""One mapping per image: the other columns of its prompt's row."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward in a run: the name it is logged under, and the weight and unit with which it enters the sum.

    A negative `weight` lowers the reward; with 0 the reward is only logged. `normalise`: `raw`, the reward's own unit,
    or `z_score`, standard deviations of this reward.
    """

    reward: Reward
    weight: float
    name: str
    normalise: Normalise = "raw"


def check_rewards(
    rewards: Sequence[WeightedReward | tuple[Reward, float]] | Mapping[str, float],
) -> list[WeightedReward]:
    """The rewards as WeightedRewards. Functions are wrapped as in a recipe; {name: weight} names registered rewards.

    UserError if there are no rewards, if two have the same name, or if all weights are 0.
    """
    if isinstance(rewards, Mapping):
        rewards = [(load("rewards", name, where="rewards")(), weight) for name, weight in rewards.items()]
    weighted = [item if isinstance(item, WeightedReward) else _weighted(*item) for item in rewards]
    if not weighted:
        raise UserError("rewards: the list is empty; name at least one, as in `rewards: {shapes: 1.0}`")
    names = [item.name for item in weighted]
    for item in weighted:
        with_defaults(item.reward, Reward)
        if names.count(item.name) > 1:
            raise UserError(
                f"rewards: two are called '{item.name}'; rename one, as in "
                f"`rewards: {{mine: {{use: {item.name}, weight: 1.0}}}}`; in Python, WeightedReward(f, 1.0, 'mine')"
            )
        if item.normalise not in get_args(Normalise):
            raise unknown_name(
                f"rewards.{item.name}: normalise", item.normalise, "a way to normalise", get_args(Normalise)
            )
    if not any(item.weight for item in weighted):
        raise UserError("rewards: all weights are 0, so nothing would be learned; give at least one a different weight")
    return weighted


def _weighted(reward: Reward, weight: float) -> WeightedReward:
    from agsm_rl_rewards.functions import as_reward

    reward = as_reward(reward)
    return WeightedReward(reward, float(weight), reward.name)


def checked_score(
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    *,
    name: str | None = None,
    metadata: Rows | None = None,
) -> Tensor:
    """The reward's scores [B]. A UserError names the reward if it fails, or if its scores are of another shape or not
    finite.

    `name`: the reward's name in the run (None: its own name). `metadata`: the other columns of each prompt's row, for
    rewards that take them.
    """

    def score() -> Any:
        # Copies, because a reward may modify its inputs in place. A clone of the images keeps their graph.
        if metadata is not None and isinstance(reward, TakesMetadata) and reward.takes_metadata:
            return reward(images.clone(), list(prompts), deepcopy(list(metadata)))  # type: ignore[call-arg]
        return reward(images.clone(), list(prompts))

    return checked_call(score, images, prompts, name=name or reward.name)


def checked_call(call: Callable[[], Any], images: Tensor, prompts: list[str], *, name: str) -> Tensor:
    """The scores [B] that a reward's `call` returns for images [B, ...]; the errors of `checked_score`."""
    from agsm_rl_rewards.returned_scores import is_plain, kind_of

    who = f"reward '{name}'"
    about = f"on {len(prompts)} images {list(images.shape[1:])}, the first for '{prompts[0]}'"
    # A reward runs in its own precision, so that it scores the same in training as in evaluation.
    with own_precision(images.device), user_code(who, about):
        score = call()
    rehearsed = images.is_meta and isinstance(score, Tensor) and score.is_meta  # the prediction of memory
    if not isinstance(score, Tensor) or not (rehearsed or is_plain(score)) or score.shape != (len(prompts),):
        got = type(score).__name__ if not isinstance(score, Tensor) else kind_of(score).removeprefix("shape ")
        raise UserError(f"{who}: it returned {got}, but one score per image is expected, of shape ({len(prompts)},)")
    score = score.float()
    if not torch.isfinite(score).all():
        bad = int((~torch.isfinite(score)).nonzero()[0])
        cause = "" if torch.isfinite(images[bad]).all() else "; the image itself is not finite: the model has diverged"
        raise UserError(f"{who}: its score is {float(score.detach()[bad])} for the prompt '{prompts[bad]}'{cause}")
    return score.to(images.device)


def scoring_device() -> torch.device:
    """The device for scoring images from files or another process: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scores_of(
    rewards: Sequence[WeightedReward], images: Tensor, prompts: list[str], metadata: Rows | None = None
) -> dict[str, Tensor]:
    """Each reward's own scores [B], by its name in the run."""
    scores = {}
    for item in rewards:
        with stage(f"scoring {len(prompts)} images with {item.name}"):
            scores[item.name] = checked_score(item.reward, images, prompts, name=item.name, metadata=metadata)
    return scores


class InParts:
    """Scores images that are drawn in parts; pass each part to `add` as soon as it is drawn.

    Rewards that run `elsewhere` score one part while the next is drawn, in one thread per reward. The others run in
    `scores`, which also raises all errors.
    """

    def __init__(self, rewards: Sequence[WeightedReward]) -> None:
        self._rewards = rewards
        self._images: list[Tensor] = []
        self._prompts: list[str] = []
        self._metadata: list[Mapping[str, Any]] = []
        self._waiting: dict[str, list[Future[Tensor]]] = {}
        self._threads: dict[str, InFlight] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for item in self._rewards:
            if item.reward.elsewhere:
                self._threads[item.name] = self._stack.enter_context(InFlight(f"reward {item.name}"))
                self._waiting[item.name] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, images: Tensor, prompts: list[str], metadata: Rows | None = None) -> None:
        """Add the next images [B, 3, H, W] with their prompts, and the other columns of the prompts' rows."""
        metadata = [{} for _ in prompts] if metadata is None else metadata
        self._images.append(images)
        self._prompts += prompts
        self._metadata += metadata
        for item in self._rewards:
            if item.name in self._threads:
                call = partial(checked_score, item.reward, images, prompts, name=item.name, metadata=metadata)
                self._waiting[item.name].append(self._threads[item.name].submit(call))

    def scores(self) -> dict[str, Tensor]:
        """Each reward's own scores [N] of all added images, by its name in the run."""
        local_rewards = [item for item in self._rewards if item.name not in self._threads]
        scores = scores_of(local_rewards, torch.cat(self._images), self._prompts, self._metadata)
        scores |= {name: self._wait_for(name, parts) for name, parts in self._waiting.items()}
        return {item.name: scores[item.name] for item in self._rewards}

    def _wait_for(self, name: str, parts: Sequence[Future[Tensor]]) -> Tensor:
        scores = []
        with stage(f"waiting for the scores of {name}", total=len(self._prompts), unit="images") as advance:
            for part in parts:
                scores.append(part.result())
                advance(len(scores[-1]))
        return torch.cat(scores)


def check_prompts(rewards: Sequence[WeightedReward], prompts: Sequence[str], metadata: Rows) -> None:
    """UserError if prompts, or the other columns of their rows, lack what one of the rewards judges by."""
    for item in rewards:
        if isinstance(item.reward, ChecksPrompts):
            item.reward.check_prompts(prompts, metadata)


def weighted_scores(
    rewards: Sequence[WeightedReward], images: Tensor, prompts: list[str], metadata: Rows | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum [B] of the rewards' scores in their own units, and each reward's own scores [B] by name."""
    scores = scores_of(rewards, images, prompts, metadata)
    return weighted_sum(rewards, scores), scores


def weighted_sum(rewards: Sequence[WeightedReward], scores: dict[str, Tensor]) -> Tensor:
    """The sum of weight · score, [B]."""
    total = torch.zeros_like(scores[rewards[0].name])
    for item in rewards:
        total = total + item.weight * scores[item.name]
    return total
