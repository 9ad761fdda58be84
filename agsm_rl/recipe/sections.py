"""The sections of a recipe that hold plain values alone: no blocks, and so no options of a registered class."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agsm_rl.recipe.options import Section


class Ema(Section):
    """The exponential moving average of the adapters' parameters.

    Args:
        decay: Share of the average that is kept at each update. Published by AGSM: 0.9999; by Flow-GRPO and
            DiffusionNFT: 0.9.
        warm_up: Keep at most (1 + n) / (10 + n) at the update after step n, so that the first steps are soon forgotten,
            as Flow-GRPO and DiffusionNFT do.
        every: Update every this many steps. Flow-GRPO: 8.
    """

    decay: float = Field(0.9999, ge=0, lt=1)
    warm_up: bool = False
    every: int = Field(1, ge=1)


class CheckpointKeys(Section):
    """Write checkpoints during the run and at its end.

    Args:
        every: Write a checkpoint every this many steps.
        keep: Number of newest checkpoints to keep.
        best: A score of an evaluation, such as `mine/sharpness` of the suite `mine`, or `strict`. The suite may be left
            out of a name that one suite has. The checkpoint with the best score is kept too, and its adapters are
            exported to adapter-best/.
    """

    every: int = Field(100, ge=1)
    keep: int = Field(2, ge=1)
    best: str | None = None


class StopRule(Section):
    """End the run when a score has fallen too far below its best so far.

    Args:
        falls_by: Size of the fall, in the unit of the score.
    """

    falls_by: float = Field(gt=0)


class WatchKeys(Section):
    """What to do when numbers go wrong: `warn`, `skip` (leave the term out of that step), `stop`, or `ignore`.

    Args:
        non_finite: A loss or gradient is not finite. It is never applied.
        non_finite_skips: With `non_finite: skip`, the run stops after this many skipped steps in a row.
        x0_norm: The latents of a drawn image are `x0_norm_factor` times as large as those of the first draw.
        x0_norm_factor: The factor for `x0_norm`.
        zero_variance: All images of a draw have the same total reward.
        constant_reward: A reward has the same value for all images of a draw.
        zero_gradient: An adapter's gradient was exactly 0 for `zero_gradient_steps` steps in a row.
        zero_gradient_steps: The number of steps for `zero_gradient`.
        step_share: One denoising step carried more than half of a term's gradient, three times in a row.
        held_out_falls: An evaluated reward that is not trained on fell below its best while a trained one improved,
            both by more than chance.
    """

    non_finite: Literal["stop", "skip"] = "stop"
    non_finite_skips: int = Field(10, ge=1)
    x0_norm: Literal["warn", "skip", "stop", "ignore"] = "warn"
    x0_norm_factor: float = Field(4.0, gt=1)
    zero_variance: Literal["warn", "skip", "stop", "ignore"] = "warn"
    constant_reward: Literal["warn", "skip", "stop", "ignore"] = "warn"
    zero_gradient: Literal["warn", "stop", "ignore"] = "warn"
    zero_gradient_steps: int = Field(10, ge=1)
    step_share: Literal["warn", "stop", "ignore"] = "warn"
    held_out_falls: Literal["warn", "stop", "ignore"] = "warn"


class WeightKeys(Section):
    """What the terms' weights mean.

    Args:
        balance: `gradient_norm` divides each term's gradient by the running mean of its length, so that a weight of 2
            is twice the step of a weight of 1 on every model. Null: weights multiply the losses.
        decay: With `balance`, the share of the running mean that is kept at each of a term's steps.
    """

    balance: Literal["gradient_norm"] | None = None
    decay: float = Field(0.98, ge=0, lt=1)


class GradientMapKeys(Section):
    """Looks at where in the model, and at which noise levels, the terms of a stack agree or fight.

    The training is not changed by it.

    Args:
        every: Look in one of every this many steps, at the cost of `levels + 1` more backward passes. Null: never.
        levels: Number of ranges of equal width into which the noise levels are divided.
    """

    every: int | None = Field(None, ge=1)
    levels: int = Field(5, ge=1, le=50)
