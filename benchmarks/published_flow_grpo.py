"""Flow-GRPO's step as in its authors' trainer (train_sd3.py of yifan123/flow_grpo), reimplemented for comparison only.

It draws with log-probabilities, scores, and then predicts each learned step of each image again, with gradients, for
both branches of guidance together (the unconditional one is detached afterwards), and once more without the adapter for
the KL. Texts are encoded for each draw. One optimiser step on all images. In its favour, there is no wandb, and no
accelerator around the transformer.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """The authors' names: `beta` is the KL's weight, `batch_size` images are learned from at once."""

    num_steps: int = 10
    num_train_timesteps: int = 9
    guidance_scale: float = 4.5
    noise_level: float = 0.7
    beta: float = 0.04
    clip_range: float = 1e-4
    batch_size: int = 8
    group_size: int = 4
    learning_rate: float = 3e-4


def sde_step(
    scheduler: Any,
    output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    *,
    noise_level: float,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The authors' `sde_step_with_logprob`: the next sample, its log-probability, its mean, and σ_t."""
    index = [scheduler.index_for_timestep(one) for one in timestep]
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    change = scheduler.sigmas[[place + 1 for place in index]].view(-1, 1, 1, 1) - sigma
    sigma_max = scheduler.sigmas[1].item()
    level = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * noise_level
    mean = sample * (1 + level**2 / (2 * sigma) * change)
    mean = mean + output * (1 + level**2 * (1 - sigma) / (2 * sigma)) * change
    std = level * torch.sqrt(-1 * change)
    if prev_sample is None:
        prev_sample = mean + std * torch.randn_like(mean)
    log_prob = -((prev_sample.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return prev_sample, log_prob.mean(dim=(1, 2, 3)), mean, level


class PublishedFlowGRPO:
    """The trainer for a StableDiffusion3Pipeline whose transformer has trained `parameters`.

    `base` gives a context in which they are off; `reward` scores images [B, 3, H, W] in [0, 1].
    """

    def __init__(
        self,
        pipeline: Any,
        parameters: list[nn.Parameter],
        *,
        base: Callable[[], AbstractContextManager[None]],
        reward: Callable[[Tensor, list[str]], Tensor],
        latent_shape: tuple[int, ...],
        settings: Settings,
    ) -> None:
        self.pipeline, self.parameters, self.base, self.reward = pipeline, parameters, base, reward
        self.latent_shape, self.settings = latent_shape, settings
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=1e-4)
        pipeline.scheduler.set_timesteps(settings.num_steps)

    def step(self, prompts: list[str]) -> None:
        """Draw an image for each of the prompts, which follow each other in groups, and learn from all."""
        sample = self._draw(prompts)
        advantages = sample.pop("rewards").view(-1, self.settings.group_size)
        advantages = (advantages - advantages.mean(1, keepdim=True)) / (advantages.std(1, keepdim=True) + 1e-4)
        sample["advantages"] = advantages.flatten()
        order = torch.randperm(len(prompts))
        self.learn({name: value[order] for name, value in sample.items()})
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def learn(self, sample: dict[str, Tensor]) -> None:
        """Add up the gradient of the whole sample, batch by batch and step by step."""
        settings = self.settings
        batches = [
            dict(zip(sample, parts, strict=True))
            for parts in zip(*(value.split(settings.batch_size) for value in sample.values()), strict=True)
        ]
        for batch in batches:
            embeds, pooled = self._both(batch["prompt_embeds"], batch["pooled_prompt_embeds"])
            for step in range(settings.num_train_timesteps):
                loss = self._loss(batch, step, embeds, pooled)
                (loss / (len(batches) * settings.num_train_timesteps)).backward()

    def _loss(self, batch: dict[str, Tensor], step: int, embeds: Tensor, pooled: Tensor) -> Tensor:
        log_prob, mean, level = self._log_prob(batch, step, embeds, pooled)
        advantages = batch["advantages"].clamp(-5, 5)
        ratio = torch.exp(log_prob - batch["log_probs"][:, step])
        clipped = ratio.clamp(1 - self.settings.clip_range, 1 + self.settings.clip_range)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        if self.settings.beta:
            with torch.no_grad(), self.base():
                base = self._log_prob(batch, step, embeds, pooled)[1]
            kl = ((mean - base) ** 2).mean(dim=(1, 2, 3), keepdim=True) / (2 * level**2)
            loss = loss + self.settings.beta * kl.mean()
        return loss

    def _log_prob(
        self, batch: dict[str, Tensor], step: int, embeds: Tensor, pooled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        timestep = batch["timesteps"][:, step]
        output = self._guided(batch["latents"][:, step], timestep, embeds, pooled)
        _, log_prob, mean, level = sde_step(
            self.pipeline.scheduler,
            output,
            timestep,
            batch["latents"][:, step],
            noise_level=self.settings.noise_level,
            prev_sample=batch["latents"][:, step + 1],
        )
        return log_prob, mean, level

    def _guided(self, latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        output = self.pipeline.transformer(
            hidden_states=torch.cat([latents] * 2),
            timestep=torch.cat([timestep] * 2),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        without, with_text = output.chunk(2)
        without = without.detach()
        return without + self.settings.guidance_scale * (with_text - without)

    @torch.no_grad()
    def _draw(self, prompts: list[str]) -> dict[str, Tensor]:
        settings, scheduler = self.settings, self.pipeline.scheduler
        embeds, pooled = self.encode(prompts)
        both = self._both(embeds, pooled)
        states, log_probs = [torch.randn(len(prompts), *self.latent_shape)], []
        for timestep in scheduler.timesteps:
            each = timestep.expand(len(prompts))
            output = self._guided(states[-1], each, *both)
            level = settings.noise_level
            state, log_prob, _, _ = sde_step(scheduler, output, each, states[-1], noise_level=level)
            states.append(state)
            log_probs.append(log_prob)
        vae = self.pipeline.vae
        images = vae.decode(states[-1] / vae.config.scaling_factor + vae.config.shift_factor).sample
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "timesteps": scheduler.timesteps.repeat(len(prompts), 1),
            "latents": torch.stack(states, dim=1),
            "log_probs": torch.stack(log_probs, dim=1),
            "rewards": self.reward((images / 2 + 0.5).clamp(0, 1), prompts),
        }

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and pooled embeddings of the prompts, each encoded as often as it occurs."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return embeds, pooled

    def _both(self, embeds: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_negative"):
            self._negative = self.encode([""])
        negative = [one.expand(len(embeds), *one.shape[1:]) for one in self._negative]
        return torch.cat([negative[0], embeds]), torch.cat([negative[1], pooled])
