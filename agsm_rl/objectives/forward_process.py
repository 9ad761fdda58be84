"""What objectives share that learn from rewarded images under noise of their own choice, not from sampling steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Metrics, RewardedBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Noised, Objective, Policy, Source
from agsm_rl.training.limits import MAX_SAMPLING_STEPS
from agsm_rl.training.old_policy import OldPolicy
from agsm_rl.training.precision import at_least_float32
from agsm_rl.training.sampling import guided
from agsm_rl.training.sizes import sampler_for


@dataclass(frozen=True)
class AtLevel:
    """A part of a batch, at one of the noise levels of each of its images."""

    batch: RewardedBatch
    level: int

    def __len__(self) -> int:
        return len(self.batch)


class ForwardProcess(Objective):
    """An objective over rewarded images, each at one noise level or several; any sampler may have drawn them.

    The options are described where subclasses list them.
    """

    consumes: ClassVar[type[Batch]] = RewardedBatch
    compares_images: ClassVar[bool] = False
    """Whether the images of a prompt's group are learned from together, under one noise and noise level."""

    def __init__(
        self,
        *,
        old: OldPolicy | Mapping[str, object] | None,
        sampler_steps: int | None,
        levels_per_image: int,
        rows_per_pass: int | None,
    ) -> None:
        for name, count in {"rows_per_pass": rows_per_pass, "sampler_steps": sampler_steps}.items():
            check_at_least_one(name, count)
        check_at_least_one("levels_per_image", levels_per_image)
        if sampler_steps is not None and sampler_steps > MAX_SAMPLING_STEPS:
            raise UserError(f"sampler_steps: got {sampler_steps}, but a sampler has {MAX_SAMPLING_STEPS} steps at most")
        if sampler_steps is not None and levels_per_image > sampler_steps:
            raise UserError(f"levels_per_image: got {levels_per_image}, but the sampler has {sampler_steps} levels")
        self.old = OldPolicy(**old) if isinstance(old, Mapping) else old  # type: ignore[arg-type]
        self.sampler_steps, self.levels_per_image = sampler_steps, levels_per_image
        self.rows_per_pass = rows_per_pass

    def check_source(self, source: Source) -> None:
        """If images are compared, a step must have several of a prompt, and a pass room for them."""
        images, updates = source.images_per_prompt, source.updates
        if not self.compares_images or images is None:
            return
        if images <= updates:
            raise UserError(
                f"a step has at most one image per prompt (images_per_prompt {images}, updates {updates}), so there is "
                f"nothing to compare; give at least {2 * updates} images_per_prompt"
            )
        if self.rows_per_pass is not None and self.rows_per_pass < ceil(images / updates):
            raise UserError(
                f"rows_per_pass is {self.rows_per_pass}, but a step learns from {ceil(images / updates)} images of one "
                f"prompt together; give {ceil(images / updates)} or more"
            )

    def split(self, batch: RewardedBatch) -> list[tuple[AtLevel, float]]:
        """Parts of `rows_per_pass` images, once for each noise level of an image; all at once by default."""
        parts = self._whole_groups(batch) if self.compares_images else in_passes(batch, self.rows_per_pass)
        levels = range(self.levels_per_image)
        return [(AtLevel(part, level), share / len(levels)) for level in levels for part, share in parts]

    def _whole_groups(self, batch: RewardedBatch) -> list[tuple[RewardedBatch, float]]:
        """Parts of at most `rows_per_pass` images that hold all images of their groups."""
        group, limit = groups_of(batch), self.rows_per_pass or len(batch)
        parts: list[list[int]] = [[]]
        for number in range(int(group.max()) + 1):
            images = (group == number).nonzero().flatten().tolist()
            if len(images) > limit:
                raise UserError(
                    f"rows_per_pass: got {limit}, but a step learns from {len(images)} images of one prompt together "
                    f"('{batch.prompts[images[0]]:.80}'); give {len(images)} or more"
                )
            if len(parts[-1]) + len(images) > limit:
                parts.append([])
            parts[-1] += images
        return [(batch.select(torch.tensor(rows)), len(rows) / len(batch)) for rows in parts]

    def loss(self, policy: Policy, batch: RewardedBatch | AtLevel) -> tuple[Tensor, Metrics]:
        """The loss of a part of a batch; of a batch that was not split, at its first noise level."""
        part = batch if isinstance(batch, AtLevel) else AtLevel(batch, 0)
        return self.loss_of(policy, part.batch, self.noised(policy, part))

    def loss_of(self, policy: Policy, batch: RewardedBatch, seen: Noised) -> tuple[Tensor, Metrics]:
        """The loss of images that have been noised: `seen`, one noise level each."""
        raise NotImplementedError

    def noised(self, policy: Policy, part: AtLevel) -> Noised:
        """The images at their noise level of this number, each level with noise of its own."""
        batch = part.batch
        if self.compares_images:
            first = first_of_group(groups_of(batch))
            batch = replace(batch, rows=batch.rows[first])
        ending = f" {part.level}" if part.level else ""
        uniform = self.sampler_steps is None
        t = policy.draw.t(batch.rows, purpose=f"t{ending}") if uniform else self._levels(policy, batch)[part.level]
        return policy.noised(batch, t=t, purpose=f"noise{ending}")

    def _levels(self, policy: Policy, batch: RewardedBatch) -> Tensor:
        """The sampler's levels within the term's range in an order of each row's own, [levels, B]; the first count."""
        draw, (low, high) = policy.draw, policy.draw.t_range
        levels = sampler_for(policy.backbone, self.sampler_steps or 1, batch.latents).t.cpu()
        levels = levels[(levels >= low) & (levels <= high)]
        if len(levels) < self.levels_per_image:
            raise UserError(
                f"sampler_steps: {len(levels)} of the sampler's {self.sampler_steps} noise levels lie in the term's t "
                f"[{low}, {high}], but levels_per_image is {self.levels_per_image}; widen t, or use fewer levels"
            )
        keys = torch.stack([draw.uniform(batch.rows, purpose=f"level {k}") for k in range(len(levels))])
        return levels[keys.argsort(dim=0)]


def check_above_zero(**options: float | None) -> None:
    """UserError for an option that is 0 or less; None is left out."""
    for name, value in options.items():
        if value is not None and value <= 0:
            raise UserError(f"{name}: got {value}, but it must be above 0")


def check_weights(**options: float) -> None:
    """UserError for a weight below 0."""
    for name, value in options.items():
        if value < 0:
            raise UserError(f"{name}: got {value}, but it must be 0 or more")


def optimality(advantages: Tensor, scale: float) -> Tensor:
    """r in [0, 1] of advantages [B]: ½ at 0, and 0 or 1 at ± `scale` and beyond."""
    return 0.5 + 0.5 * (advantages / scale).clamp(-1, 1)


def matching_error(prediction: Tensor, target: Tensor, *, adaptive: bool = False) -> Tensor:
    """Mean squared error of each image's prediction, [B], of predictions and targets [B, C, h, w] in float32.

    `adaptive` divides it by the image's mean absolute error, without gradient: DiffusionNFT's self-normalised weight.
    """
    difference = at_least_float32(prediction) - at_least_float32(target.detach())
    squared = (difference**2).flatten(1).mean(1)
    return squared / difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5) if adaptive else squared


def reference_prediction(policy: Policy, seen: Noised, *, guidance: float = 1.0) -> Tensor:
    """The reference's prediction [B, C, h, w] for noised images, under classifier-free guidance; no gradient."""
    uncond = seen.cond if guidance == 1 else policy.backbone.encode_text([""])
    return guided(policy.reference, seen.x_t, seen.t, seen.cond, uncond, guidance)


def groups_of(batch: RewardedBatch) -> Tensor:
    """The number of each image's group, [B] on the CPU: 0, 1, … in the order of appearance.

    Groups are the source's; where it names none, the images of a prompt are one.
    """
    keys: list[object] = list(batch.prompts) if batch.groups is None else batch.groups.tolist()
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([numbers[key] for key in keys])


def first_of_group(group: Tensor) -> Tensor:
    """The place of the first image of each image's group, [B]."""
    places = torch.arange(len(group))
    return torch.stack([places[group == number].min() for number in group])


def sums_by_group(values: Tensor, group: Tensor) -> Tensor:
    """The sum of `values` [B] over each group of `group` [B] (0, 1, …), [groups]."""
    count = int(group.max()) + 1
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, group.to(values.device), values)
