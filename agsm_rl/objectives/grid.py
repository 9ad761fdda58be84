"""The grid of images and prompts [B, P] that contrastive objectives (AGSM, SoftREPA) predict: own and others' prompts.

A batch is cut into groups; each image is held against the prompts of its group. One noise per image (or one for all
images of a group), shared by all its prompts, and one noise level per step, shared by the batch.
"""

import logging
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Backbone, Bank, Cond, PairBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Policy
from agsm_rl.training.randomness import Draw

log = logging.getLogger(__name__)

NoisePer = Literal["image", "group"]
TOKENIZED_AT_ONCE = 256
PROMPTS_HELD = 100_000


@dataclass(frozen=True)
class SomeImages(PairBatch):
    """Whole groups of pairs, of which `images` [k], row numbers, are learned from, each under its group's prompts."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)


class Groups:
    """How a batch is cut: groups of `size` images, `per_pass` groups and of these `images_per_pass` images at once.

    None is all. Each of `noise`, image or group, has a noise of its own.
    """

    def __init__(
        self, size: int, per_pass: int | None = None, noise: NoisePer = "image", images_per_pass: int | None = None
    ) -> None:
        if noise not in get_args(NoisePer):
            raise unknown_name("noise", noise, "what has a noise of its own", get_args(NoisePer))
        if size < 2:
            raise UserError(f"group_size: got {size}, but a group needs 2 or more images to have negatives")
        check_at_least_one("groups_per_pass", per_pass)
        check_at_least_one("images_per_pass", images_per_pass)
        self.size, self.per_pass, self.noise, self.images_per_pass = size, per_pass, noise, images_per_pass
        self._warned = False
        self._read_by: Backbone | None = None
        self._read: dict[str, tuple[int, ...]] = {}

    def check(self, batch_size: int) -> None:
        """UserError unless the batch is whole groups."""
        if batch_size % self.size:
            raise UserError(f"batch_size {batch_size} is not a multiple of group_size {self.size}; change one of them")

    def check_prompts(self, prompts: list[str], backbone: Backbone) -> None:
        """UserError unless there are `size` prompts that differ in what the text encoders read of them."""
        texts = list(dict.fromkeys(prompts))
        different: set[tuple[int, ...]] = set()
        for begin in range(0, len(texts), TOKENIZED_AT_ONCE):
            different |= {tokens.ids for tokens in backbone.read_tokens(texts[begin : begin + TOKENIZED_AT_ONCE])}
            if len(different) >= self.size:
                return
        cut = f" (within the {backbone.token_limit} tokens that are read)" if len(texts) >= self.size else ""
        lower = f" set group_size to {len(different)}," if len(different) > 1 else ""
        raise UserError(
            f"the source has only {len(different)} different caption{'s' * (len(different) > 1)}{cut}, but the "
            f"{self.size} images of a group learn from each other's captions; give each image its own caption,{lower} "
            "or use score_matching, which needs no other captions"
        )

    def _ids(self, prompts: list[str], backbone: Backbone) -> list[tuple[int, ...]]:
        """What the text encoders read of the prompts; those of the newest batches are held."""
        if backbone is not self._read_by or len(self._read) > PROMPTS_HELD:
            self._read_by, self._read = backbone, {}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._read]
        if new:
            read = backbone.read_tokens(new)
            self._read |= {prompt: tokens.ids for prompt, tokens in zip(new, read, strict=True)}
        return [self._read[prompt] for prompt in prompts]

    def _negatives(self, prompts: list[str], columns: Tensor, backbone: Backbone) -> Tensor | None:
        """Which prompts of each image's group, [B, P] on the CPU, differ from its own; None where all others do."""
        numbers: dict[tuple[int, ...], int] = {}
        same = torch.tensor([numbers.setdefault(ids, len(numbers)) for ids in self._ids(prompts, backbone)])
        if len(numbers) == len(prompts):
            return None
        negatives = same[columns] != same[:, None]
        alone = int((~negatives.any(dim=1)).sum())
        if alone and not self._warned:
            self._warned = True
            log.warning(
                "%d of %d images have nothing but their own caption in their group ('%.80s'), and so no negatives: "
                "they learn from the positive part of the loss alone (reported once)",
                alone,
                len(prompts),
                prompts[int((~negatives.any(dim=1)).nonzero()[0])],
            )
        return negatives if int(negatives.sum()) < len(prompts) * (self.size - 1) else None

    def split(self, batch: PairBatch) -> list[tuple[PairBatch, float]]:
        """Parts of `per_pass` groups, or of some of their images, with their shares of the batch.

        Images of one prompt go to different groups.
        """
        self.check(len(batch))
        order = apart(batch.prompts, self.size)
        batch = batch if order == sorted(order) else batch.select(torch.tensor(order))
        whole = in_passes(batch, None if self.per_pass is None else self.per_pass * self.size)
        if self.images_per_pass is None:
            return whole
        of_groups = [(_some_images(groups, self.images_per_pass, self.size), share) for groups, share in whole]
        return [(part, share * of) for parts, share in of_groups for part, of in parts]

    def grid(self, policy: Policy, batch: PairBatch) -> "Grid":
        """The noised latents of the batch's images, their targets, and the prompts that each is held against."""
        count, x0 = len(batch.prompts), batch.latents
        self.check(count)
        images = batch.images if isinstance(batch, SomeImages) else torch.arange(count)
        here = images.to(x0.device)
        x0, t = x0[here], policy.draw.shared_t(len(batch), x0.device)
        # A group's noise is that of its first image.
        noise = policy.draw.noise_like(
            x0, batch.rows[images // self.size * self.size if self.noise == "group" else images]
        )
        columns, own = group_columns(count, self.size)
        negatives = self._negatives(batch.prompts, columns, policy.backbone)
        return Grid(
            x_t=policy.backbone.add_noise(x0, noise, t),
            t=t,
            target=policy.backbone.target(x0, noise, t),
            cond=batch.encode_text(policy.backbone),
            images=here,
            columns=columns[images].to(x0.device),
            own=own[images].to(x0.device),
            negatives=None if negatives is None else negatives[images].to(x0.device),
            is_own=tuple((columns == torch.arange(count)[:, None])[images].flatten().tolist()),
        )


def _some_images(batch: PairBatch, count: int, size: int) -> list[tuple[PairBatch, float]]:
    """Parts of `count` images with the prompts of their groups of `size`, each with its share of the batch."""
    if count >= len(batch):
        return [(batch, 1.0)]
    parts: list[tuple[PairBatch, float]] = []
    for images in torch.arange(len(batch)).split(count):
        first, end = int(images[0]) // size * size, (int(images[-1]) // size + 1) * size
        groups = batch.select(torch.arange(first, end))
        known = {item.name: getattr(groups, item.name) for item in fields(PairBatch)}
        parts.append((SomeImages(**known, images=images - first), len(images) / len(batch)))
    return parts


@dataclass(frozen=True)
class Grid:
    """Noised images x_t [B, C, h, w] at levels `t` [B], `target` [B, C, h, w], and the prompts of each: cond[columns].

    `images` [B] and `columns` [B, P] are row numbers of `cond`; `own` [B] is the column of each image's own prompt;
    `is_own` says of each of the B·P predictions whether it is under that one, without waiting for a device.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    cond: Cond
    images: Tensor
    columns: Tensor
    own: Tensor
    is_own: tuple[bool, ...]
    negatives: Tensor | None
    """Which prompts are negatives of each image [B, P], where some are the same as its own; None: all but its own."""

    def predict(self, predict: Any, *, others: Bank = "negative") -> Tensor:
        """Predictions [B, P, C, h, w]; `predict` is a Policy's `live` or `ema`.

        Own prompts use the bank `positive`, the others the bank `others`.
        """
        places = torch.arange(self.columns.numel())
        found = self._at(predict, places, others)
        return found.reshape(*self.columns.shape, *found.shape[1:])

    def predict_some(self, predict: Any, chosen: Tensor, *, rest: Tensor, others: Bank = "negative") -> Tensor:
        """As `predict`, at own prompts and at the `chosen` [B, P] (on the CPU) alone; elsewhere `rest`, no gradient."""
        places = (chosen.flatten() | torch.tensor(self.is_own)).nonzero().flatten()
        found = self._at(predict, places, others)
        filled = rest.detach().flatten(0, 1).to(found.dtype)
        return filled.index_copy(0, places.to(found.device), found).reshape(rest.shape)

    def _at(self, predict: Any, places: Tensor, others: Bank) -> Tensor:
        """Predictions at places of the flattened grid, [places, C, h, w]."""
        bank = tuple("positive" if self.is_own[place] else others for place in places.tolist())
        whole = len(places) == self.columns.numel()
        found: Tensor = predict(*(self._all_rows if whole else self._rows(places)), bank=bank)
        return found

    @cached_property
    def _all_rows(self) -> tuple[Tensor, Tensor, Cond]:
        """The whole grid's rows: long prompts take much memory, so that they are repeated once for all predictions."""
        return self._rows(torch.arange(self.columns.numel()))

    def _rows(self, places: Tensor) -> tuple[Tensor, Tensor, Cond]:
        """x_t, t and prompts of places of the flattened grid."""
        places = places.to(self.x_t.device)
        image = places // self.columns.shape[1]
        cond = self.cond[self.columns.flatten()[places]].of_pictures(self.cond[self.images[image]])
        return self.x_t[image], self.t[image], cond

    def some_negatives(self, draw: Draw, rows: Tensor, count: int) -> Tensor:
        """`count` of each image's negatives (all, if it has fewer) at random, [B, P] on the CPU.

        `rows` are those of the whole batch, as the draw numbers them.
        """
        rows = rows[self.images.to(rows.device)]
        is_own = torch.tensor(self.is_own).reshape(self.columns.shape)
        allowed = ~is_own if self.negatives is None else self.negatives.cpu() & ~is_own
        keys = torch.stack(
            [draw.uniform(rows, purpose=f"negative {column}") for column in range(is_own.shape[1])], dim=1
        )
        places = keys.masked_fill(~allowed, 2.0).argsort(dim=1).argsort(dim=1)
        return allowed & (places < count)


def mean_or_zero(values: Tensor) -> Tensor:
    """The mean; 0 of no values, so that each process has the same metrics."""
    return values.sum() / max(len(values), 1)


def own_prompts(own: Tensor, count: int) -> Tensor:
    """Where in a grid each image's own prompt is, [B, count], from the columns `own` [B] of any integer type."""
    return torch.nn.functional.one_hot(own.long(), count).bool()


def group_columns(batch_size: int, group_size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Which prompts each image is held against: its own group's. Columns [B, P] and `own` [B]."""
    rows = torch.arange(batch_size, device=device)
    columns = (rows // group_size * group_size)[:, None] + torch.arange(group_size, device=device)[None]
    return columns, rows % group_size


def apart(prompts: list[str], size: int) -> list[int]:
    """An order of the rows by which groups of `size` hold no prompt twice, or as seldom as can be.

    A prompt is not a negative of itself. If all prompts differ, the rows keep their order.
    """
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    if len(places) == len(prompts):
        return list(range(len(prompts)))
    # Rows of one prompt next to each other, then dealt out to the groups in turn.
    rows = sorted(range(len(prompts)), key=lambda row: places[prompts[row]])
    groups = len(prompts) // size
    return [row for group in range(groups) for row in rows[group::groups]]
