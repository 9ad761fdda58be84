"""AGSM's step as in the published trainer, reimplemented for comparison in benchmarks only.

A second complete denoiser holds the EMA's tokens. Both denoisers evaluate every image with every prompt of its group,
all rows at once. Images and text are encoded within the step. On a GPU, weights are in float16 under autocast with a
gradient scaler. In its favour, images come decoded and resized, and only the tokens of the EMA copy are updated.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TokenRows:
    """Soft tokens in a separate U-Net: bank and time rows, inserted after BOS in the down and mid blocks.

    soft_tokens: (2, n, D). time_tokens: (100, D).
    """

    def __init__(self, unet: Any, soft_tokens: Tensor, time_tokens: Tensor) -> None:
        self.soft_tokens = nn.Parameter(soft_tokens.detach().clone())
        self.time_tokens = nn.Parameter(time_tokens.detach().clone())
        self.unet = unet
        self._rows: Tensor | None = None
        for block in (*unet.down_blocks, unet.mid_block):
            if getattr(block, "has_cross_attention", False):
                block.register_forward_pre_hook(self._insert, with_kwargs=True)

    def predict(self, x_t: Tensor, timestep: int, text: Tensor, banks: Tensor) -> Tensor:
        """The U-Net's prediction for rows x_t [N, C, h, w], `text` [N, S, D] and `banks` [N] of 0 or 1."""
        self._rows = self.soft_tokens[banks] + self.time_tokens[timestep // 10]
        return self.unet(x_t, timestep, encoder_hidden_states=text, return_dict=False)[0]

    def _insert(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        text = kwargs["encoder_hidden_states"]
        longer = torch.cat([text[:, :1], self._rows.to(text.dtype), text[:, 1:]], dim=1)
        return args, kwargs | {"encoder_hidden_states": longer}


class PublishedAGSM:
    """The trainer for a StableDiffusionPipeline, which must not be used elsewhere.

    `tokens` and `ema_tokens` are initial values, each with `soft_tokens` and `time_tokens`.
    """

    def __init__(
        self,
        pipeline: Any,
        tokens: Mapping[str, Tensor],
        ema_tokens: Mapping[str, Tensor],
        *,
        group_size: int = 4,
        temperature: float = 0.1,
        gamma_positive: float = 1.0,
        gamma_negative: float = 1.0,
        ema_decay: float = 0.9999,
    ) -> None:
        self.pipeline, self.group_size, self.temperature = pipeline, group_size, temperature
        self.gamma_positive, self.gamma_negative, self.ema_decay = gamma_positive, gamma_negative, ema_decay
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        self.device: torch.device = pipeline.device
        # Copy before adding hooks, which belong to the live denoiser.
        copied = copy.deepcopy(pipeline.unet)
        self.live, self.ema = TokenRows(pipeline.unet, **tokens), TokenRows(copied, **ema_tokens)
        self.parameters = [self.live.soft_tokens, self.live.time_tokens]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)

    def to_half(self) -> None:
        """Switch to weights in float16 under autocast, with a gradient scaler."""
        for module in (self.live.unet, self.ema.unet, self.pipeline.vae, self.pipeline.text_encoder):
            module.half()
        self.scaler = torch.amp.GradScaler(self.device.type)

    def step(self, images: Tensor, prompts: list[str]) -> float:
        """Learn from images [B, 3, H, W] in [0, 1] and their prompts; returns the loss."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.float16, enabled=self.scaler.is_enabled()):
            loss = self.loss(images, prompts)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for name in ("soft_tokens", "time_tokens"):
                getattr(self.ema, name).lerp_(getattr(self.live, name), 1 - self.ema_decay)
        return loss.item()

    def loss(
        self, images: Tensor, prompts: list[str], *, noise: Tensor | None = None, timestep: int | None = None
    ) -> Tensor:
        """The guided score loss; noise [B, C, h, w] and timestep are drawn unless given."""
        with torch.no_grad():
            latents, text = self._encode(images, prompts)
            noise = torch.randn_like(latents) if noise is None else noise.to(latents)
            timestep = int(torch.randint(1000, ())) if timestep is None else timestep
            x_t = self.pipeline.scheduler.add_noise(latents, noise, torch.tensor([timestep], device=self.device))
        image, prompt = self._grid(len(images))
        banks = (image != prompt).long()
        shape = (len(images), self.group_size, *x_t.shape[1:])
        live = self.live.predict(x_t[image], timestep, text[prompt], banks).float().reshape(shape)
        with torch.no_grad():
            ema = self.ema.predict(x_t[image], timestep, text[prompt], banks).float().reshape(shape)
            target = noise.float()[:, None]
            reward = -(target - ema).square().mean((2, 3, 4))
            weights = (reward / self.temperature).softmax(1)
            delta = ema - (weights[:, :, None, None, None] * ema).sum(1, keepdim=True)
        own = (image == prompt).reshape(len(images), self.group_size)
        positive = (live - target - self.gamma_positive * delta).square().mean((2, 3, 4))[own].mean()
        negative = (live - target + self.gamma_negative * delta).square().mean((2, 3, 4))[~own].mean()
        return positive + negative

    def _encode(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        vae, tokenizer = self.pipeline.vae, self.pipeline.tokenizer
        pixels = (2 * images - 1).to(self.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        padding = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        ids = tokenizer(prompts, return_tensors="pt", **padding).input_ids
        return latents, self.pipeline.text_encoder(ids.to(self.device))[0]

    def _grid(self, count: int) -> tuple[Tensor, Tensor]:
        """Image and prompt of each row, [B · group_size] each."""
        image = torch.arange(count, device=self.device).repeat_interleave(self.group_size)
        place = torch.arange(self.group_size, device=self.device).repeat(count)
        return image, image // self.group_size * self.group_size + place
