"""TRL's AlignPropTrainer on our parts: reward backpropagation (arXiv 2310.03739) and the trainer's step.

An epoch is one optimiser step: `train_gradient_accumulation_steps` batches of `train_batch_size` images a process.
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
"""Under which random numbers are drawn."""
OFFSET = 10.0
"""TRL's loss is 10 minus the mean reward."""


@dataclass(frozen=True)
class DescribedPrompts(Batch):
    """Prompts with what `prompt_function` gave beside them, `metadata` [B]."""

    metadata: list[Any]


class PromptFunctionSource(Source):
    """Batches of `batch_size` prompts a process from the user's `prompt_function`."""

    gives: type[Batch] = DescribedPrompts
    batch_size: int

    def __init__(self, prompt_function: Any, batch_size: int, first_row: int) -> None:
        self.prompt_function, self.batch_size, self.first_row = prompt_function, batch_size, first_row

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Nothing depends on these: the function draws."""

    def next(self, policy: Policy) -> DescribedPrompts:
        """The next prompts."""
        prompts, metadata = zip(*(self.prompt_function() for _ in range(self.batch_size)), strict=True)
        rows = torch.arange(self.batch_size) + self.first_row
        return DescribedPrompts(prompts=list(prompts), rows=rows, metadata=list(metadata))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the function's state is the user's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""


class FunctionBackprop(Objective):
    """10 minus the mean of the user's `reward_function(images, prompts, metadata)`; keeps the images for the hook."""

    consumes: ClassVar[type[Batch]] = DescribedPrompts

    def __init__(self, config: AlignPropConfig, reward_function: Any) -> None:
        self.config, self.reward_function = config, reward_function
        self.seen: list[dict[str, Any]] = []
        """What was drawn and scored since it was last emptied, an entry a batch."""

    def split(self, batch: DescribedPrompts) -> list[tuple[DescribedPrompts, float]]:
        """Batches of `train_batch_size`."""
        return in_passes(batch, self.config.train_batch_size)

    def loss(self, policy: Policy, batch: DescribedPrompts) -> tuple[Tensor, Metrics]:
        """10 minus the mean reward of an image a prompt."""
        config = self.config
        carrying = self._carrying(policy.draw.step)
        images = draw_with_gradients(
            policy,
            batch,
            carries=carrying.__contains__,
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
                "reward_function: its scores carry no gradient, which AlignProp backpropagates; compute them from "
                "`images` by differentiable operations, or use DDPOTrainer"
            )
        self.seen.append(
            {"images": images, "prompts": prompts, "prompt_metadata": metadata, "rewards": rewards.detach()}
        )
        return OFFSET - rewards.mean(), {}

    def _carrying(self, step: int) -> set[int]:
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
    """`reward_function(images, prompts, metadata)` → (scores, metadata): images [B, 3, H, W] in [0, 1], tuples of
    `train_batch_size` prompts and of what `prompt_function()` → (prompt, metadata) gave with them; the scores must have
    gradients. `image_samples_hook(batch, global_step, tracker)`: each `log_image_freq` steps, a dictionary of the last
    batch's `images`, `prompts`, `prompt_metadata` and `rewards`. See docs/from_trl.md for what differs from TRL 0.11.
    """

    def _term(self) -> tuple[FunctionBackprop, PromptFunctionSource]:
        config = self.config
        config.check()
        count = config.train_batch_size * config.train_gradient_accumulation_steps
        self._objective = FunctionBackprop(config, self.reward_fn)
        return self._objective, PromptFunctionSource(self.prompt_fn, count, count * self.accelerator.process_index)

    def step(self, epoch: int, global_step: int) -> int:
        """Draw, score and learn from an epoch's images; returns the number of optimiser steps so far."""
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
