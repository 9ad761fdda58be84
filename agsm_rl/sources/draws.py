"""What sources share that draw from the policy for a list of prompts: each draw is learned from in `updates` shares."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Batch, Shard
from agsm_rl.policy import Policy, Source
from agsm_rl.sources.fitting_parts import FittingParts
from agsm_rl.sources.order import Order
from agsm_rl.sources.prompt_lists import read_prompts
from agsm_rl.sources.rows import check_divides
from agsm_rl.training.scoring import WeightedReward, check_prompts
from agsm_rl.training.sizes import Resolution, check_drawable, drawing_at

Share = TypeVar("Share", bound=Batch)

ON_CPU = ("rows", "groups", "step")
"""Numbers of rows, groups and steps, which are looked up and not computed with."""


class Draws(Source, Generic[Share]):
    """Draws for the prompts of a file or data set in turn; what a draw gives is handed out share by share."""

    prompts: str
    prompt_column: str | None
    prompt_split: str | None
    prompt_config: str | None
    rewards: Sequence[WeightedReward]
    num_prompts: int
    updates: int
    sample_batch_size: int
    drawn_at_once: int = 1
    """Images that each row draws together, which cannot be drawn one by one."""
    resolution: Resolution | None = None
    """The size of what is drawn; None: the backbone's."""

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Read the prompts; UserError if there are none, or a reward cannot judge one of them."""
        check_divides("num_prompts", self.num_prompts, shard, name)
        rows = read_prompts(self.prompts, column=self.prompt_column, split=self.prompt_split, config=self.prompt_config)
        self._prompts = [row.text for row in rows]
        self._metadata = [row.metadata for row in rows]
        check_prompts(self.rewards, self._prompts, self._metadata)
        self._order = Order(len(self._prompts), seed, name)
        self._name, self._seed, self._shard = name, seed, shard
        self._draws, self._pending = 0, deque[Share]()
        self._parts = FittingParts(self.sample_batch_size, name=name, images=self.drawn_at_once)
        self._metrics: dict[str, float] = {}

    def fit_to(self, backbone: Backbone) -> None:
        """UserError where the backbone cannot draw pictures of `resolution`."""
        if self.resolution is not None:
            check_drawable(backbone, self.resolution, where=f"{self._name}.resolution")

    def prompt_texts(self) -> list[str]:
        """All prompts."""
        return self._prompts

    def unlearned(self) -> int:
        """Shares of the newest draw that are still to be learned from."""
        return len(self._pending)

    def next(self, policy: Policy) -> Share:
        """The next share of the newest draw; draws anew when all shares were learned from."""
        if not self._pending:
            with drawing_at(policy.backbone, self.resolution):
                self._pending.extend(self._draw(policy))
            self._draws += 1
        return _moved(self._pending.popleft(), policy.backbone.device)

    @abstractmethod
    def _draw(self, policy: Policy) -> Iterable[Share]:
        """Draw for the next `num_prompts` prompts of all processes: this process's part, in `updates` shares."""

    @abstractmethod
    def _restored(self, kept: Mapping[str, Any]) -> Share:
        """A share from its fields, as a checkpoint holds them."""

    def state_dict(self) -> dict[str, Any]:
        """Position, and the shares not yet learned from."""
        return {
            "position": self._order.position,
            "draws": self._draws,
            "processes": self._shard.count,
            "pending": [{item.name: getattr(batch, item.name) for item in fields(batch)} for batch in self._pending],
            "metrics": dict(self._metrics),
            "sample_batch_size": self._parts.size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; UserError if that would lose other processes' shares."""
        if state["pending"] and (self._shard.count > 1 or state.get("processes", 1) > 1):
            raise UserError(
                f"{self._name}: the checkpoint was made between the {self.updates} `updates` of a draw, of which it "
                f"holds one process's share; if that was the only process, resume with one, or delete that "
                f"checkpoint to resume from an older one"
            )
        self._order.position, self._draws = int(state["position"]), int(state["draws"])
        self._pending = deque(self._restored(kept) for kept in state["pending"])
        self._metrics = dict(state["metrics"])
        # What was found to fit; checkpoints of earlier versions do not have it.
        self._parts.size = min(self._parts.size, int(state.get("sample_batch_size", self._parts.size)))


def _moved(batch: Share, device: torch.device) -> Share:
    """The batch on the backbone's device: a loaded state is on the CPU."""
    tensors = {item.name: getattr(batch, item.name) for item in fields(batch) if item.name not in ON_CPU}
    moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
    return replace(batch, **moved)
