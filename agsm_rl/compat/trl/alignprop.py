"""TRL's AlignPropTrainer, built on our reward backpropagation (arXiv 2310.03739) and our trainer's step.

An epoch is one optimiser step, on `train_gradient_accumulation_steps` batches of `train_batch_size` images per process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from agsm_rl.compat.trl.base import BaseTrainer, checked_rewards
from agsm_rl.compat.trl.config import AlignPropConfig
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Metrics, Shard
from agsm_rl.objectives.passes import in_passes
from agsm_rl.objectives.reward_backprop import draw_with_gradients
from agsm_rl.policy import Objective, Policy, Source
from agsm_rl.training.randomness import stream

NAME = "trl/alignprop"
"""Names the stream that random numbers are drawn from."""
OFFSET = 10.0
"""TRL's loss is 10 minus the mean reward."""


@dataclass(frozen=True)
class DescribedPrompts(Batch):
    """Prompts, and the `metadata` [B] that `prompt_function` returned with them."""

    metadata: list[Any]


class PromptFunctionSource(Source):
    """Batches of `batch_size` prompts per process from the user's `prompt_function`."""

    gives: type[Batch] = DescribedPrompts
    batch_size: int

    def __init__(self, prompt_function: Any, batch_size: int, first_row: int) -> None:
        self.prompt_function, self.batch_size, self.first_row = prompt_function, batch_size, first_row

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Does nothing: the function draws the prompts."""

    def next(self, policy: Policy) -> DescribedPrompts:
        """The next prompts."""
        prompts, metadata = zip(*(self.prompt_function() for _ in range(self.batch_size)), strict=True)
        rows = torch.arange(self.batch_size) + self.first_row
        return DescribedPrompts(prompts=list(prompts), rows=rows, metadata=list(metadata))

    def state_dict(self) -> dict[str, Any]:
        """Empty: the function's state belongs to the user."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: there is no state to restore."""


class FunctionBackprop(Objective):
    """10 minus the mean of the user's `reward_function(images, prompts, metadata)`; keeps the images for the hook.

    Attributes:
        seen: What was drawn and scored since the list was last cleared, one entry per batch.
    """

    consumes: ClassVar[type[Batch]] = DescribedPrompts

    def __init__(self, config: AlignPropConfig, reward_function: Any) -> None:
        self.config, self.reward_function = config, reward_function
        self.seen: list[dict[str, Any]] = []

    def split(self, batch: DescribedPrompts) -> list[tuple[DescribedPrompts, float]]:
        """Batches of `train_batch_size`."""
        return in_passes(batch, self.config.train_batch_size)

    def loss(self, policy: Policy, batch: DescribedPrompts) -> tuple[Tensor, Metrics]:
        """10 minus the mean reward, for one image per prompt."""
        config = self.config
        steps = self._steps_with_gradients(policy.draw.step)
        images = draw_with_gradients(
            policy,
            batch,
            carries=steps.__contains__,
            num_steps=config.sample_num_steps,
            guidance=max(config.sample_guidance_scale, 1.0),
            eta=config.sample_eta,
            negative_prompt=config.negative_prompts or "",
        )
        prompts, metadata = tuple(batch.prompts), tuple(batch.metadata)
        returned, _ = self.reward_function(images, prompts, metadata)
        rewards = checked_rewards(returned, prompts, images.device)
        if torch.is_grad_enabled() and not rewards.requires_grad:
            raise UserError(
                "reward_function: its scores carry no gradient, but AlignProp backpropagates through them; compute "
                "them from `images` with differentiable operations, or use DDPOTrainer"
            )
        self.seen.append(
            {"images": images, "prompts": prompts, "prompt_metadata": metadata, "rewards": rewards.detach()}
        )
        return OFFSET - rewards.mean(), {}

    def _steps_with_gradients(self, step: int) -> set[int]:
        """The denoising steps whose predictions carry gradients; the last one always does."""
        config = self.config
        count = config.sample_num_steps
        if not config.truncated_backprop_rand:
            first = [config.truncated_backprop_timestep] * count
        else:
            low, high = config.truncated_rand_backprop_minmax
            first = stream(config.seed, f"{NAME}/steps", step).integers(low, high + 1, size=count).tolist()
        return {k for k in range(count) if k >= first[k]} | {count - 1}


class AlignPropTrainer(BaseTrainer[AlignPropConfig]):
    """Trains by backpropagating a differentiable reward. docs/from_trl.md lists the differences from TRL 0.11.

    Args:
        config: The options.
        reward_function: `reward_function(images, prompts, metadata)` → (scores, metadata), where images are
            [B, 3, H, W] in [0, 1], and prompts and metadata are tuples of `train_batch_size` items. The scores must
            carry gradients.
        prompt_function: `prompt_function()` → (prompt, metadata).
        sd_pipeline: The pipeline to train.
        image_samples_hook: `image_samples_hook(batch, global_step, tracker)`, called every `log_image_freq` steps with
            the last batch's `images`, `prompts`, `prompt_metadata` and `rewards` as a dictionary.
    """

    def _term(self) -> tuple[FunctionBackprop, PromptFunctionSource]:
        config = self.config
        config.check()
        count = config.train_batch_size * config.train_gradient_accumulation_steps
        self._objective = FunctionBackprop(config, self.reward_fn)
        return self._objective, PromptFunctionSource(self.prompt_fn, count, count * self.accelerator.process_index)

    def step(self, epoch: int, global_step: int) -> int:
        """Draw and score an epoch's images and learn from them; returns the number of optimiser steps so far."""
        self._objective.seen.clear()
        figures = self._trainer.run_step()
        seen = self._objective.seen
        rewards = self.accelerator.gather(torch.cat([batch["rewards"] for batch in seen])).float().cpu()
        logged: dict[str, Any] = {
            "reward_mean": float(rewards.mean()),
            "reward_std": float(rewards.std(correction=0)),
            "loss": figures["trl/loss"],
            "epoch": epoch,
        }
        self.accelerator.log(logged, step=global_step)
        global_step += 1
        if self.image_samples_callback is not None and global_step % self.config.log_image_freq == 0:
            last = seen[-1]
            self.image_samples_callback(last | {"images": last["images"].detach()}, global_step, self._tracker)
        return global_step
