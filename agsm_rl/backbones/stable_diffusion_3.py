"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a joint transformer that predicts a flow, two CLIPs and a T5.

The noise level is the flow's own: σ = t, so that x_t = (1 − t)·x0 + t·noise, and the transformer is asked at timestep
1000·t. A recipe's range of t is thus a range of σ, unshifted; only the sampler shifts its schedule.
"""

from typing import Any

import torch
from torch import Tensor

from agsm_rl.backbones.flow import FlowSampler, flow_scheduler
from agsm_rl.backbones.frozen_pipeline import FrozenPipeline
from agsm_rl.backbones.parts import check_scheduler
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Cond

LONGEST_TEXT = 512


class StableDiffusion3(FrozenPipeline):
    """A frozen StableDiffusion3Pipeline, with its T5 or without."""

    name = "stable_diffusion_3"
    use = "stable_diffusion_3"
    part = "transformer"
    wraps = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
    drawing = (4.0, 28)
    t5_length = 256
    """Tokens that the T5 reads, padding included: the pipeline's own default."""

    def _wrap(self, pipeline: Any, resolution: int | None, gradient_checkpointing: bool) -> None:
        super()._wrap(pipeline, resolution, gradient_checkpointing)
        largest = pipeline.transformer.config.pos_embed_max_size * pipeline.vae_scale_factor * self._patch_size()
        if self.resolution > largest:
            raise UserError(f"backbone.resolution: got {resolution}, but this transformer goes up to {largest}.")
        check_scheduler(pipeline.scheduler, "shift", "FlowMatchEulerDiscreteScheduler")
        self._num_timesteps: int = flow_scheduler(pipeline.scheduler.config).config.num_train_timesteps

    @property
    def call_options(self) -> dict[str, Any]:
        """The picture's size, and how many tokens the T5 reads."""
        return {**super().call_options, "max_sequence_length": self.t5_length}

    def _shorten_text(self, t5_length: int) -> None:
        if not 1 <= t5_length <= LONGEST_TEXT:
            raise UserError(f"backbone.t5_length: got {t5_length}; diffusers allows 1 to {LONGEST_TEXT} tokens.")
        self.t5_length = t5_length

    def _patch_size(self) -> int:
        return self.pipeline.transformer.config.patch_size

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """The CLIPs' hidden states followed by T5's [B, 77 + 256, D], and the CLIPs' pooled embeddings, float32.

        Equal prompts are encoded once. Without a T5 its rows are zeros, as in diffusers.
        """
        unique = list(dict.fromkeys(prompts))
        rows = [unique.index(prompt) for prompt in prompts]
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                unique,
                None,
                None,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                max_sequence_length=self.t5_length,
            )
            dtype = torch.promote_types(embeds.dtype, torch.float32)
            return Cond(embeds[rows].to(dtype), pooled[rows].to(dtype), tuple(prompts))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 − t)·x0 + t·noise [B, C, h, w]."""
        sigma = t.to(x0)[:, None, None, None]
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The flow from image to noise: noise − x0."""
        return noise - x0

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The transformer's flow [B, C, h, w], in x_t's dtype."""
        assert cond.pooled is not None
        dtype = self.pipeline.transformer.dtype
        with self._attention():
            prediction = self.denoiser(
                hidden_states=x_t.to(dtype),
                timestep=t.float() * self._num_timesteps,
                encoder_hidden_states=cond.embeds.to(dtype),
                pooled_projections=cond.pooled.to(dtype),
                return_dict=False,
            )[0]
        return prediction.to(x_t.dtype, copy=self.compiled)

    def sampler(self, num_steps: int) -> FlowSampler:
        """The pipeline's own schedule with its shift."""
        _, height, width = self.latent_shape
        tokens = (height // self._patch_size()) * (width // self._patch_size())
        return FlowSampler(self.pipeline.scheduler.config, num_steps, self.device, image_tokens=tokens)
