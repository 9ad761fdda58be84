"""What sources give and objectives learn from: rows with their prompts, and images, preferences, rollouts or steps.

`Cond` and the protocols are in interfaces.py, from which these types can be imported too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor

if TYPE_CHECKING:
    from agsm_rl.interfaces import Backbone, Bank, Cond
    from agsm_rl.training.kept_graph import KeptGraph


@dataclass(frozen=True)
class Batch:
    """Rows that one or more terms learn from. `rows` [B] are the rows' numbers in the whole step's batch.

    Noise is drawn per row number (randomness.Draw), so that splitting a batch over processes or chunks changes nothing.
    """

    prompts: list[str]
    rows: Tensor
    cond: Cond | None = field(default=None, kw_only=True)
    """The encoded prompts, one row each, if the source has them; use `encode_text` to get them."""
    metadata: list[Mapping[str, Any]] | None = field(default=None, kw_only=True)
    """The other columns of each prompt's row, if the source has them: plain values, for rewards and views."""

    def __len__(self) -> int:
        return len(self.prompts)

    def encode_text(self, backbone: Backbone) -> Cond:
        """The encoded prompts: the source's if it has them, else the backbone's. Objectives use this."""
        return backbone.encode_text(self.prompts) if self.cond is None else self.cond

    def select(self, index: Tensor) -> Self:
        """The given rows as a batch of their own."""
        chosen: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in self.shared:
                chosen[item.name] = value
            elif isinstance(value, list):
                chosen[item.name] = [value[i] for i in index.tolist()]
            else:
                chosen[item.name] = value if value is None else value[index]
        return type(self)(**chosen)

    shared: ClassVar[tuple[str, ...]] = ()
    """Fields that do not have one entry per row."""
    given_by: ClassVar[str] = ""
    """For messages: which options make a source give such a batch, if it depends on options."""


@dataclass(frozen=True)
class PairBatch(Batch):
    """Images with their captions. `latents` [B, C, h, w]."""

    latents: Tensor
    crops: Tensor | None = field(default=None, kw_only=True)
    """How each image was cut, as `Cond` has it; None: not at all, or it is not to be told."""

    def encode_text(self, backbone: Backbone) -> Cond:
        """The encoded prompts, with how the images were cut."""
        cond = super().encode_text(backbone)
        return cond if self.crops is None else replace(cond, crops=self.crops)


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """Two images for one prompt. `chosen` and `rejected` are latents [B, C, h, w]."""

    chosen: Tensor
    rejected: Tensor
    chosen_crops: Tensor | None = field(default=None, kw_only=True)
    rejected_crops: Tensor | None = field(default=None, kw_only=True)
    """How each image was cut, as `Cond` has it; None: not at all, or it is not to be told."""


@dataclass(frozen=True)
class RewardedBatch(PairBatch):
    """Images drawn from the policy and their worth: `rewards` and `advantages` [B], without gradients."""

    rewards: Tensor
    advantages: Tensor
    groups: Tensor | None = field(default=None, kw_only=True)
    """The number of each image's prompt in the draw, [B], on the CPU: a prompt that was drawn twice is two groups."""


@dataclass(frozen=True)
class RolloutBatch(RewardedBatch):
    """Images with the path of K noisy steps that led to them; all tensors without gradients.

    `latents` [B, C, h, w] are the finished images' latents; `trajectory` [B, K + 1, C, h, w] the states from noise to
    them; `log_probs` [B, K]; `steps` those among the K that are learned from.
    """

    trajectory: Tensor
    log_probs: Tensor
    num_steps: int
    steps: tuple[int, ...]
    guidance: float
    eta: float
    """The level of the steps' noise: η of `ddim`, else a."""
    negative_prompt: str = ""
    """What guidance steers away from."""
    graph: KeptGraph | None = None
    """The steps' distributions under the live policy, with gradients, where the source kept them."""
    noise: str = "ddim"
    """The form of the steps' noise, as `Sampler` has it."""
    means: Tensor | None = None
    """The steps' means as they were drawn, [B, K, C, h, w], where the source kept them."""
    guidance_bank: Bank | None = None
    guidance_prompt: Literal["empty", "same"] | None = None
    """The form of guidance that it was drawn with (training/guidance.py); None: as the adapters say."""

    shared: ClassVar[tuple[str, ...]] = (
        *("num_steps", "steps", "guidance", "eta", "negative_prompt", "graph", "noise"),
        *("guidance_bank", "guidance_prompt"),
    )
    given_by: ClassVar[str] = " (rollouts give one with `eta` above 0 and `drawn_by: live`)"


@dataclass(frozen=True)
class StepPreferenceBatch(Batch):
    """Pairs of ways that a denoising step went from like states, the better one as `chosen`; no gradients.

    `step` [B], on the CPU: the number of the step; `chosen_from`, `rejected_from` [B, C, h, w]: the states before it;
    `chosen`, `rejected`: those after it; `weight` [B]: what a pair counts in the mean over the rows.
    """

    step: Tensor
    chosen_from: Tensor
    chosen: Tensor
    rejected_from: Tensor
    rejected: Tensor
    weight: Tensor
    num_steps: int
    guidance: float
    eta: float
    """The level of the steps' noise, as in RolloutBatch."""
    noise: str = "ddim"
    negative_prompt: str = ""
    same_start: bool = True
    """Whether the two states before each step are one."""

    shared: ClassVar[tuple[str, ...]] = ("num_steps", "guidance", "eta", "noise", "negative_prompt", "same_start")
