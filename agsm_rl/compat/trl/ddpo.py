"""TRL's DDPOTrainer, built on our rollouts, per-prompt advantages, DDPO loss (arXiv 2305.13301) and trainer's step.

An epoch draws and scores images with the live policy, normalises the rewards, then learns from all images in a random
order, `train_batch_size` at a time, using all of their denoising steps before each optimiser step.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from agsm_rl.compat.trl.base import BaseTrainer, checked_rewards
from agsm_rl.compat.trl.config import DDPOConfig
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, RolloutBatch, Shard
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.policy import Policy, Source
from agsm_rl.sources.advantages import normalised_by_prompt
from agsm_rl.sources.trajectories import StepNoise, draw_trajectories
from agsm_rl.training.randomness import Draw, stream

NAME = "trl/ddpo"
"""Names the stream that random numbers are drawn from."""


class EpochRollouts(Source):
    """A source that returns whatever the epoch loop puts into `batch`, and keeps the prompts' reward histories."""

    gives: type[Batch] = RolloutBatch

    def __init__(self, *, history: int) -> None:
        self.history = history
        self.batch: RolloutBatch | None = None
        self.histories: dict[str, deque[float]] = {}

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Does nothing: the epoch loop draws."""

    def next(self, policy: Policy) -> RolloutBatch:
        """The latest batch."""
        assert self.batch is not None
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """The reward histories."""
        return {"histories": {prompt: list(past) for prompt, past in self.histories.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.histories = {prompt: deque(past, maxlen=self.history) for prompt, past in state["histories"].items()}


class DDPOTrainer(BaseTrainer[DDPOConfig]):
    """Trains by policy gradient on any reward. docs/from_trl.md lists the differences from TRL 0.11.

    Args:
        config: The options.
        reward_function: `reward_function(images, prompts, metadata)` → (scores, metadata), where images are
            [B, 3, H, W] in [0, 1], and prompts and metadata are tuples of `sample_batch_size` items.
        prompt_function: `prompt_function()` → (prompt, metadata).
        sd_pipeline: The pipeline to train.
        image_samples_hook: `image_samples_hook(batches, global_step, tracker)`, called once per epoch. Each batch is a
            list [images, prompts, metadata, scores, the reward's metadata].
    """

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]],
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: Any,
        image_samples_hook: Callable[[Any, int, Any], Any] | None = None,
    ) -> None:
        config.check()
        self._rollouts = EpochRollouts(history=config.per_prompt_stat_tracking_buffer_size)
        super().__init__(config, reward_function, prompt_function, sd_pipeline, image_samples_hook)

    def _term(self) -> tuple[DDPO, EpochRollouts]:
        config = self.config
        return DDPO(clip_range=config.train_clip_range, images_per_pass=config.train_batch_size), self._rollouts

    def step(self, epoch: int, global_step: int) -> int:
        """Draw and score an epoch's images and learn from them; returns the number of optimiser steps so far."""
        rollouts, image_data = self._draw(epoch)
        scores, metadata = self.compute_rewards(image_data, is_async=self.config.async_reward_computation)
        for batch, score, extra in zip(image_data, scores, metadata, strict=True):
            batch.extend([score, extra])
        if self.image_samples_callback is not None:
            self.image_samples_callback(image_data, global_step, self._tracker)
        rewards = torch.cat(list(scores)).detach()
        all_rewards = self.accelerator.gather(rewards).cpu()
        mean, std = float(all_rewards.mean()), float(all_rewards.std(correction=0))
        figures = {"reward": all_rewards.float().numpy(), "epoch": epoch, "reward_mean": mean, "reward_std": std}
        self.accelerator.log(figures, step=global_step)
        this_process = slice(int(rollouts.rows[0]), int(rollouts.rows[-1]) + 1)
        advantages = self._advantages(all_rewards, gather_object(rollouts.prompts))[this_process].to(rewards.device)
        rollouts = replace(rollouts, rewards=rewards.float(), advantages=advantages.float())
        for inner_epoch in range(self.config.train_num_inner_epochs):
            global_step = self._learn(rollouts, epoch, inner_epoch, global_step)
        return global_step

    def compute_rewards(self, image_data: list[list[Any]], is_async: bool = False) -> tuple[list[Tensor], list[Any]]:
        """Scores and the reward's metadata, one entry per batch of `image_data`."""
        if is_async:
            with ThreadPoolExecutor(self.config.max_workers) as pool:
                returned = list(pool.map(lambda batch: _scored(self.reward_fn(*batch)), image_data))
        else:
            returned = [_scored(self.reward_fn(*batch)) for batch in image_data]
        device = self.accelerator.device
        scores = [
            checked_rewards(score, batch[1], device) for (score, _), batch in zip(returned, image_data, strict=True)
        ]
        return scores, [metadata for _, metadata in returned]

    @torch.no_grad()
    def _draw(self, epoch: int) -> tuple[RolloutBatch, list[list[Any]]]:
        """This process's images of the epoch, not yet scored, and [images, prompts, metadata] per batch."""
        config = self.config
        count = config.sample_batch_size * config.sample_num_batches_per_epoch
        rows = torch.arange(count) + count * self.accelerator.process_index
        draw = Draw(config.seed, NAME, epoch)
        paths: list[Tensor] = []
        log_probs: list[Tensor] = []
        image_data: list[list[Any]] = []
        for part in rows.split(config.sample_batch_size):
            prompts, metadata = zip(*(self.prompt_fn() for _ in range(len(part))), strict=True)
            with self.accelerator.autocast():
                path, log_prob = draw_trajectories(
                    self.policy,
                    list(prompts),
                    draw,
                    part,
                    num_steps=config.sample_num_steps,
                    # Up to 1, TRL draws without guidance, but still applies its formula when learning.
                    guidance=max(config.sample_guidance_scale, 1.0),
                    noise=StepNoise(level=config.sample_eta),
                    negative_prompt=config.negative_prompts,
                )
                images = self.policy.backbone.decode(path[:, -1])
            paths.append(path)
            log_probs.append(log_prob)
            image_data.append([images, prompts, metadata])
        trajectory = torch.cat(paths)
        unknown = torch.zeros(count, device=trajectory.device)
        rollouts = RolloutBatch(
            prompts=[prompt for _, prompts, _ in image_data for prompt in prompts],
            rows=rows,
            latents=trajectory[:, -1],
            rewards=unknown,
            advantages=unknown,
            trajectory=trajectory,
            log_probs=torch.cat(log_probs),
            num_steps=config.sample_num_steps,
            steps=tuple(range(config.sample_num_steps)),
            guidance=config.sample_guidance_scale if config.train_cfg else 1.0,
            eta=config.sample_eta,
            negative_prompt=config.negative_prompts,
        )
        return rollouts, image_data

    def _advantages(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """Normalised rewards of all processes [N], clipped to ± `train_adv_clip_max`."""
        config = self.config
        if config.per_prompt_stat_tracking:
            advantages = normalised_by_prompt(
                rewards,
                prompts,
                self._rollouts.histories,
                history=self._rollouts.history,
                min_history=config.per_prompt_stat_tracking_min_count,
            )
        else:
            advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)
        return advantages.clamp(-config.train_adv_clip_max, config.train_adv_clip_max)

    def _learn(self, rollouts: RolloutBatch, epoch: int, inner_epoch: int, global_step: int) -> int:
        config = self.config
        order = stream(config.seed, f"{NAME}/order", epoch, inner_epoch, self.accelerator.process_index)
        rows = torch.from_numpy(order.permutation(len(rollouts)))
        for part in rows.split(config.train_batch_size * config.train_gradient_accumulation_steps):
            steps = sorted(order.choice(config.sample_num_steps, config.num_train_timesteps, replace=False).tolist())
            self._rollouts.batch = replace(rollouts.select(part), steps=tuple(steps))
            figures = self._trainer.run_step()
            logged: dict[str, Any] = {
                "approx_kl": figures["trl/approximate_kl"],
                "clipfrac": figures["trl/clip_fraction"],
                "loss": figures["trl/loss"],
                "epoch": epoch,
                "inner_epoch": inner_epoch,
            }
            self.accelerator.log(logged, step=global_step)
            global_step += 1
        return global_step


def _scored(returned: Any) -> tuple[Any, Any]:
    """The reward function's (scores, metadata); waits for futures."""
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise UserError(f"reward_function: returned {type(returned).__name__}, but it must return (scores, metadata)")
    scores, metadata = (part.result() if isinstance(part, Future) else part for part in returned)
    return scores, metadata
