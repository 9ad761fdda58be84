"""What a term sees of a shared batch: the best images, the best against the worst, those that teach it something.

A batch of rollouts is drawn and scored once; a policy gradient learns from all of it, and through these views AGSM or
Diffusion-DPO learn from the same images. Preferences are unpaired in the same way.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, PairBatch, PreferenceBatch, RewardedBatch, RolloutBatch
from agsm_rl.policy import Source, View


class BestImages(View):
    """The images with the largest advantages as image-prompt pairs; the best of each prompt come first.

    If fewer images than the share are good enough, the term skips the step, so that AGSM's groups stay complete. Of n
    images per prompt, a share of 1/n is best-of-n.

    Args:
        share: Share of the batch to pass on, in (0, 1].
        min_advantage: Images with a smaller advantage are never passed on.
    """

    consumes: ClassVar[type[Batch]] = RewardedBatch
    gives: ClassVar[type[Batch]] = PairBatch

    def __init__(self, *, share: float = 0.25, min_advantage: float = 0.0) -> None:
        if not 0 < share <= 1:
            raise UserError(f"share: got {share}, but it must lie in (0, 1]")
        self.share, self.min_advantage = share, min_advantage

    def check(self, source: Source) -> None:
        """UserError if no image could ever pass."""
        total = source.batch_size
        if total is not None and not self.batch_size(total):
            raise UserError(
                f"share: {self.share:g} of {total} images rounds to 0; give a larger share, or draw more images"
            )

    def batch_size(self, total: int) -> int:
        """Rows that are left of `total`."""
        return round(self.share * total)

    def __call__(self, batch: RewardedBatch) -> PairBatch:
        """The best rows; none if too few are good enough."""
        place = _place_in_prompt(batch)
        good = [row for row in range(len(batch)) if batch.advantages[row] >= self.min_advantage]
        order = sorted(good, key=lambda row: (place[row], -float(batch.advantages[row])))
        wanted = self.batch_size(len(batch))
        chosen = order[:wanted] if len(order) >= wanted else []
        return _pairs_of(batch, chosen)


class ImagesAbove(View):
    """All images that are good enough, as image-prompt pairs, however many those are; the best come first.

    Score matching on them is fine-tuning on what the reward accepts. The term skips a step in which there are none.

    Args:
        reward: Images whose reward is below it are left out.
        advantage: Images whose advantage is below it are left out; 0 is what is usual for the prompt.
        multiple_of: Pass on so many images or a multiple of it, and leave out the worst ones; AGSM needs its
            `group_size`.
    """

    consumes: ClassVar[type[Batch]] = RewardedBatch
    gives: ClassVar[type[Batch]] = PairBatch

    def __init__(self, *, reward: float | None = None, advantage: float | None = None, multiple_of: int = 1) -> None:
        if reward is None and advantage is None:
            raise UserError("images_above: neither `reward` nor `advantage` is given, so all images would pass")
        if multiple_of < 1:
            raise UserError(f"multiple_of: got {multiple_of}, but it must be 1 or more")
        self.reward, self.advantage, self.multiple_of = reward, advantage, multiple_of

    def __call__(self, batch: RewardedBatch) -> PairBatch:
        """The good rows in the order of their advantages, earlier ones first where those tie."""
        limits = [(batch.rewards, self.reward), (batch.advantages, self.advantage)]
        if batch.rewards.is_meta:  # in a rehearsal, which has no numbers, all may be good
            limits = []
        good = [
            row
            for row in range(len(batch))
            if all(limit is None or float(values[row]) >= limit for values, limit in limits)
        ]
        best_first = sorted(good, key=lambda row: -float(batch.advantages[row]))
        return _pairs_of(batch, best_first[: len(good) // self.multiple_of * self.multiple_of])


class VariedGroups(View):
    """The images of prompts whose images differ in reward, for objectives that learn from finished images.

    A prompt whose images are all worth the same, as often with a reward of 0 or 1, teaches a comparison nothing; here
    it is no part of the mean. It is judged by the images of the prompt that the step has: with `updates`, its share. A
    policy gradient takes `nonzero_advantages` for that. The term skips a step in which no prompt's images differ.
    """

    consumes: ClassVar[type[Batch]] = RewardedBatch
    gives: ClassVar[type[Batch]] = RewardedBatch

    def check(self, source: Source) -> None:
        """UserError if no prompt has two images in a step."""
        _check_compares(source)

    def __call__(self, batch: RewardedBatch) -> RewardedBatch:
        """The rows of the groups that differ, in their order."""
        if batch.rewards.is_meta:  # in a rehearsal, which has no numbers, they may be all
            return batch
        keys = list(batch.prompts) if batch.groups is None else batch.groups.tolist()
        rewards: dict[object, set[float]] = {}
        for key, reward in zip(keys, batch.rewards.tolist(), strict=True):
            rewards.setdefault(key, set()).add(reward)
        kept = [row for row, key in enumerate(keys) if len(rewards[key]) > 1]
        return batch.select(torch.tensor(kept, dtype=torch.long))


class BestAgainstWorst(View):
    """Of each prompt's images the best as `chosen` and the worst as `rejected`; prompts whose images tie are left out.

    That makes Diffusion-DPO an on-policy objective (online DPO). On several processes, each forms its own pairs.
    """

    consumes: ClassVar[type[Batch]] = RewardedBatch
    gives: ClassVar[type[Batch]] = PreferenceBatch

    def check(self, source: Source) -> None:
        """UserError if no prompt has two images in a step."""
        _check_compares(source)

    def __call__(self, batch: RewardedBatch) -> PreferenceBatch:
        """One pair per prompt."""
        best, worst = [], []
        for prompt in dict.fromkeys(batch.prompts):
            rows = [row for row, other in enumerate(batch.prompts) if other == prompt]
            rewards = batch.rewards[rows]
            if rewards.max() > rewards.min():
                best.append(rows[int(rewards.argmax())])
                worst.append(rows[int(rewards.argmin())])
        chosen, rejected = torch.tensor(best, dtype=torch.long), torch.tensor(worst, dtype=torch.long)
        return PreferenceBatch(
            prompts=[batch.prompts[row] for row in best],
            rows=batch.rows[chosen],
            chosen=batch.latents[chosen],
            rejected=batch.latents[rejected],
            metadata=_metadata_of(batch, best),
        )


class NonzeroAdvantages(View):
    """The rollouts whose advantage is not 0, for a policy gradient: the others are left out of its mean.

    Flow-GRPO's code leaves them out (arXiv 2505.05470): a group of equal rewards then makes neither the mean of the
    policy loss smaller nor the KL's larger. The mean is over the rollouts of all processes that are left; if none are,
    the term skips the step. The authors spread what is left evenly over the updates of a draw; here each of the
    `updates` keeps what is left of its own share.
    """

    consumes: ClassVar[type[Batch]] = RolloutBatch
    gives: ClassVar[type[Batch]] = RolloutBatch

    def __call__(self, batch: RolloutBatch) -> RolloutBatch:
        """The rows whose advantage is not exactly 0."""
        if batch.advantages.is_meta:  # in a rehearsal, which has no numbers, they may be all
            return batch
        return batch.select(batch.advantages.nonzero().flatten())


class ChosenImages(View):
    """Of preferences, the chosen images alone, as image-prompt pairs: AGSM or score matching learn from them."""

    consumes: ClassVar[type[Batch]] = PreferenceBatch
    gives: ClassVar[type[Batch]] = PairBatch

    def batch_size(self, total: int) -> int:
        """One pair per preference."""
        return total

    def __call__(self, batch: PreferenceBatch) -> PairBatch:
        """The chosen images under their prompts."""
        return PairBatch(
            batch.prompts,
            batch.rows,
            batch.chosen,
            cond=batch.cond,
            metadata=batch.metadata,
            crops=batch.chosen_crops,
        )


def _check_compares(source: Source) -> None:
    """UserError for a source that has no two images of a prompt in a step."""
    images, updates = source.images_per_prompt, source.updates
    if images is not None and images <= updates:
        raise UserError(
            f"a step has at most one image per prompt (images_per_prompt {images}, updates {updates}), so there is "
            f"nothing to compare; give at least {2 * updates} images_per_prompt"
        )


def _pairs_of(batch: RewardedBatch, rows: list[int]) -> PairBatch:
    """These rows as image-prompt pairs, in this order."""
    index = torch.tensor(rows, dtype=torch.long)
    return PairBatch(
        [batch.prompts[row] for row in rows],
        batch.rows[index],
        batch.latents[index],
        metadata=_metadata_of(batch, rows),
    )


def _metadata_of(batch: Batch, rows: list[int]) -> list[Mapping[str, Any]] | None:
    return None if batch.metadata is None else [batch.metadata[row] for row in rows]


def _place_in_prompt(batch: RewardedBatch) -> list[int]:
    """0 for the best image of its prompt, 1 for the second, …; earlier rows first where advantages tie."""
    place = [0] * len(batch)
    seen: dict[str, int] = {}
    order: Tensor = torch.sort(batch.advantages, descending=True, stable=True).indices
    for row in order.tolist():
        place[row] = seen.get(batch.prompts[row], 0)
        seen[batch.prompts[row]] = place[row] + 1
    return place
