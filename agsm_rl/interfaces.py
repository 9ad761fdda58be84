"""The nouns that everything else is made of: read this module first, then bases.py and policy.py.

An objective never knows which backbone, adapter or source it got, and the trainer never knows which objective runs:
they meet only through the protocols here, the batch types of batches.py and the base classes of bases.py.
Images are float [B, 3, H, W] in [0, 1]; noise levels `t` are float [B] in [0, 1), 0 being clean (a flow's sampler
begins at 1); tensors are float32 unless loaded otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from agsm_rl.batches import Batch, PairBatch, PreferenceBatch, RewardedBatch, RolloutBatch, StepPreferenceBatch

if TYPE_CHECKING:
    from agsm_rl.adapters.token_places import TokenPlaces, UNetPlace

__all__ = [
    "Adapter",
    "Backbone",
    "Bank",
    "Banks",
    "Batch",
    "ChecksPrompts",
    "Combine",
    "Cond",
    "Metrics",
    "PairBatch",
    "PreferenceBatch",
    "Reward",
    "RewardedBatch",
    "RolloutBatch",
    "Sampler",
    "Shard",
    "StepPreferenceBatch",
    "TakesMetadata",
    "Tokens",
]

Bank = Literal["positive", "negative"]
Banks = tuple[Bank, ...]
"""One bank per row of a prediction."""
Metrics = dict[str, Tensor]
Combine = Callable[[Tensor, Tensor, float, Tensor], Tensor]
"""Guidance's (uncond, cond, scale, t) → prediction, for branches [B, C, h, w] at noise levels `t` [B]."""


@dataclass(frozen=True)
class Cond:
    """Encoded prompts, one row each: `embeds` [B, S, D] and, for backbones that use one, `pooled` [B, D'].

    `prompts`, one per row, are the texts they were encoded from: if an adapter changes the text encoders, a policy
    encodes them again for each prediction. Without them, the encoding stays as it is.
    `mask` [B, S], bool, says which of the S rows are read; None: all.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    prompts: tuple[str, ...] = ()
    unconditional_first: bool = False
    """Whether the first half of the rows is guidance's unconditional branch; rows that are taken out are ordinary."""
    unconditional_detached: bool = False
    """Whether that half is predicted without gradients, and so without what they would take; `unconditional_first`."""
    mask: Tensor | None = None
    crops: Tensor | None = None
    """How each row's picture was cut, [B, 4]: its own height and width, and what was cut off at the top and left after
    it was resized, in pixels, for models that are told (SDXL). It belongs to the picture, not the prompt. None: as if
    the picture had been made in the size it has."""
    combine: Combine | None = field(default=None, compare=False, repr=False)
    """How the model's own pipeline combines guidance's branches; None: uncond + scale · (cond − uncond)."""

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Tensor | slice | list[int]) -> Cond:
        prompts: tuple[str, ...] = ()
        if self.prompts:
            numbers = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows]
            prompts = tuple(self.prompts[number] for number in numbers.tolist())
        others = (self.pooled, self.mask, self.crops)
        pooled, mask, crops = (None if part is None else part[rows] for part in others)
        return Cond(self.embeds[rows], pooled, prompts, mask=mask, crops=crops, combine=self.combine)

    @staticmethod
    def cat(parts: list[Cond]) -> Cond:
        """The rows of all parts, one after another; prompts only if every part has its own.

        ValueError where some parts have crops and others none (`of_pictures` gives them).
        Shorter texts are padded with zeros, which the mask leaves unread.
        """
        pooled = [part.pooled for part in parts if part.pooled is not None]
        known = all(len(part.prompts) == len(part) for part in parts)
        prompts = tuple(prompt for part in parts for prompt in part.prompts) if known else ()
        longest, mask = max(part.embeds.shape[1] for part in parts), None
        if any(part.mask is not None or part.embeds.shape[1] < longest for part in parts):
            mask = torch.cat([part._padded_mask(longest) for part in parts])
        embeds = torch.cat([pad(part.embeds, (0, 0, 0, longest - part.embeds.shape[1])) for part in parts])
        crops = [part.crops for part in parts if part.crops is not None]
        if crops and len(crops) < len(parts):
            raise ValueError("some parts say how their pictures were cut, others do not: give those `of_pictures`")
        return Cond(
            embeds,
            torch.cat(pooled) if pooled else None,
            prompts,
            mask=mask,
            crops=torch.cat(crops) if crops else None,
            combine=parts[0].combine,
        )

    def of_pictures(self, others: Cond) -> Cond:
        """The same prompts for other rows' pictures, row by row: it says how those were cut."""
        return replace(self, crops=others.crops)

    def _padded_mask(self, longest: int) -> Tensor:
        seen = self.mask
        if seen is None:
            seen = torch.ones(self.embeds.shape[:2], dtype=torch.bool, device=self.embeds.device)
        return pad(seen, (0, longest - seen.shape[1]), value=False)

    def expand(self, count: int) -> Cond:
        """A single row repeated `count` times, without copying."""
        others = (self.pooled, self.mask, self.crops)
        pooled, mask, crops = (None if part is None else part.expand(count, -1) for part in others)
        embeds = self.embeds.expand(count, -1, -1)
        return Cond(embeds, pooled, self.prompts * count, mask=mask, crops=crops, combine=self.combine)


class Tokens(NamedTuple):
    """What text encoders read of a prompt: the `ids` of all of them, and whether each of them leaves its end unread."""

    ids: tuple[int, ...]
    is_cut: bool


class Sampler(Protocol):
    """A schedule of K denoising steps whose transitions are Gaussian: x_{k+1} ~ N(mean, std²)."""

    t: Tensor
    """Noise level before each step, [K], descending."""

    def transition(self, k: int, x_t: Tensor, prediction: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and standard deviation (0-d; 0 when `eta` is 0) of step `k`, for tensors of any device.

        A sampler whose steps can have other forms of noise names them all in `noises`, the default of rollouts first
        and `ddim` among them, and takes `noise=` here, `ddim` by default.
        """
        ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen diffusers pipeline behind one convention; callers never ask whether it predicts noise or a flow."""

    name: str
    pipeline: Any
    denoiser: nn.Module
    latent_shape: tuple[int, int, int]
    """C, h and w of a picture of its resolution."""
    resolution: int | tuple[int, int]
    """Pixels per side, or (height, width), of what it draws; training/sizes.py changes it for a while."""
    device: torch.device
    adapters: list[Adapter]
    """The attached ones; they add and remove themselves."""
    text_encoders: dict[str, nn.Module]
    """The pipeline's text encoders that a LoRA can change, by their names in it; not SD3's T5."""
    lora_targets: tuple[str, ...]
    """Ends of the names of the denoiser's modules that LoRA and its like change by default."""

    @property
    def drawing(self) -> tuple[float, int]:
        """Default guidance and number of steps to draw with."""
        ...

    @property
    def call_options(self) -> dict[str, Any]:
        """What the pipeline needs besides prompts to draw as `predict` predicts: the picture's size, …"""
        ...

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """Encode prompts; "" is the unconditional prompt. Gradients, where on, for adapters that change the text."""
        ...

    def encode_negative(self, prompt: str) -> Cond:
        """One row: what guidance steers away from, encoded as the pipeline encodes its negative prompt."""
        ...

    @property
    def token_limit(self) -> int:
        """Tokens of a prompt that the text encoder with the longest reach reads."""
        ...

    def read_tokens(self, prompts: list[str]) -> list[Tokens]:
        """What is read of each prompt; prompts with the same `ids` are the same to the model."""
        ...

    def encode_images(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → latents [B, C, h, w], scaled as the denoiser wants them.

        The VAE's mean, or a sample of its posterior with standard normal `noise` of the latents' shape.
        """
        ...

    def identity(self, of: Literal["images", "text"]) -> str:
        """A digest of all that `encode_images` or `encode_text` depends on: weights, sizes, tokenizers."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] → images [B, 3, H, W] in [0, 1]; differentiable."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of the forward process at noise levels `t` [B]."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` is regressed on: the noise for SD1.5 and SDXL, noise − x0 for SD3's flow."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser's prediction for rows x_t [B, C, h, w] at levels `t` [B] under `cond` (B rows)."""
        ...

    def level_of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The noise level t, 0-d or [B], of a call of the denoiser with these arguments, whatever its own time is."""
        ...

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> TokenPlaces:
        """Where soft tokens enter the denoiser; UserError where they cannot, or the options do not fit."""
        ...

    def guidance_arguments(self, guidance: float, negative_prompts: list[str] | None, count: int) -> dict[str, Any]:
        """Arguments with which the pipeline draws under classifier-free guidance; 1 is none."""
        ...

    def sampler(self, num_steps: int) -> Sampler:
        """The schedule with `num_steps` steps on which rollouts are drawn."""
        ...


class Adapter(Protocol):
    """Trained parameters attached to a backbone by hooks or by PEFT; switched off, the base model is exact."""

    kind: ClassVar[str]
    """Its name in recipes and exported files."""
    mixes_banks: ClassVar[bool]
    """Whether training mixes banks in the rows of one prediction; if not, a policy predicts bank by bank."""
    bank: Bank | Banks | None
    """The bank that predictions use now; None while switched off or detached."""
    banks: int
    """1, which serves under both names, or 2."""
    changes_text: bool
    """Whether the bank in use changes how prompts are encoded."""

    @classmethod
    def from_export(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """An adapter of the shape of an export, to be attached and then filled by `load_export`."""
        ...

    def attach(self, backbone: Backbone) -> None:
        """Create the parameters for this backbone and hook them in (switched on, bank `positive`)."""
        ...

    def detach(self) -> None:
        """Remove every trace from the backbone, bit for bit."""
        ...

    def places(self, backbone: Backbone) -> list[str]:
        """Names of the denoiser's modules that it acts on, by its options; attached or not."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters; names are stable over runs."""
        ...

    def using(self, bank: Bank | Banks | None) -> AbstractContextManager[None]:
        """Within the block, predictions use this bank; None switches the adapter off.

        An adapter with one bank uses it for both names. Blocks nest. One bank per row is for predictions with as many
        rows, by adapters that `mixes_banks` or have a form of guidance (training/guidance.py).
        """
        ...

    def recall(self) -> AbstractContextManager[None]:
        """A context, to be entered later, in which predictions use what they use now.

        Gradient checkpointing runs part of the denoiser again, long after `using` has exited.
        """
        ...

    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and string metadata for a safetensors file that `load_export` takes back."""
        ...

    def load_export(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Fill the parameters from an export; UserError if it is for another base."""
        ...


class Shard(Protocol):
    """This process among the run's processes (accelerate's, behind the three things that sources need)."""

    index: int
    count: int

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes, in order."""
        ...


@runtime_checkable
class Reward(Protocol):
    """A score of images: `reward(images [B, 3, H, W] in [0, 1], prompts)` → float [B]; more is better.

    A reward need only have a name and be callable: `with_defaults` fills in the rest when it enters a run.
    """

    name: str
    range: tuple[float, float] = (-math.inf, math.inf)
    """The smallest and the largest score."""
    differentiable: bool = False
    """Whether gradients flow from the scores to the images."""
    elsewhere: bool = False
    """Whether it waits for another process or machine. Rollouts call such a reward from a thread, one batch at a time,
    while they draw the next one."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor: ...


@runtime_checkable
class TakesMetadata(Protocol):
    """A reward that can also be called as `reward(images, prompts, metadata)`, one mapping per image.

    The mappings are the other columns of the prompts' file.
    """

    takes_metadata: bool


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward that can tell, before anything is drawn, whether prompts and their columns hold what it judges by."""

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """UserError, naming the prompt, if one lacks what the reward needs."""
        ...
