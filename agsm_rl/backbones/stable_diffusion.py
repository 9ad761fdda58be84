"""Stable Diffusion 1.5 (arXiv 2112.10752) and XL (arXiv 2307.01952): a U-Net on latents, with one CLIP or two.

Everything in it is frozen and in evaluation mode. Callers see images in [0, 1] and t in [0, 1); whether the network
predicts the noise or v (arXiv 2202.00512) is settled here, from the scheduler's configuration.
"""

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor

from agsm_rl.adapters.token_places import PUBLISHED_PLACES, CrossAttentionPlaces, UNetPlace
from agsm_rl.backbones.ddim import DDIMSampler, ddim_scheduler
from agsm_rl.backbones.frozen_pipeline import FrozenPipeline
from agsm_rl.backbones.parts import check_scheduler
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Cond
from agsm_rl.training.precision import at_least_float32, widest_float
from agsm_rl.training.sizes import Resolution


class StableDiffusion(FrozenPipeline):
    """A frozen StableDiffusionPipeline or StableDiffusionXLPipeline; options as in FrozenPipeline.

    SDXL's denoiser also sees each prompt's pooled embedding (`Cond.pooled`), and time ids: the picture's own size, how
    it was cropped (`Cond.crops`) and the size as drawn; by default, that it is that large and was not cropped.
    """

    name = "stable_diffusion"
    use = "stable_diffusion"
    part = "unet"
    denoiser_class = "UNet2DConditionModel"
    loads = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    wraps = (
        *loads,
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    single_files = {
        "conditioner.embedders.1.": "StableDiffusionXLPipeline",
        "cond_stage_model.": "StableDiffusionPipeline",
    }
    without = {
        "StableDiffusionPipeline": {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    }
    drawing = (7.0, 30)  # the figures of arXiv 2605.30038

    def _resolution_step(self, factor: int) -> int:
        return lcm(factor, 8)  # diffusers' pipelines of U-Nets draw no others

    def _draw_by(self, scheduler: str) -> None:
        if scheduler != "ddim":
            raise UserError(f"backbone.scheduler: got {scheduler!r}; allowed: ddim, or leave it out.")
        self.pipeline.scheduler = ddim_scheduler(self.pipeline.scheduler.config)

    def _lay_out(self, memory_format: str) -> None:
        if memory_format != "channels_last":
            raise UserError(f"backbone.memory_format: got {memory_format!r}; allowed: channels_last, or leave it out.")
        for module in (self.denoiser, self.pipeline.vae, self._vae):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> CrossAttentionPlaces:
        """The U-Net's down and mid blocks, or those at `places`; their text begins with BOS, then come the tokens."""
        if layers is not None:
            raise UserError(
                "soft_tokens.layers: a U-Net's blocks share their tokens; leave it out here. Exported tokens that have "
                "layers were trained on another kind of model, such as SD3, and work only there."
            )
        return CrossAttentionPlaces(self.denoiser, PUBLISHED_PLACES if places is None else places)

    def _wrap(self, pipeline: Any, resolution: Resolution | None, gradient_checkpointing: bool) -> None:
        super()._wrap(pipeline, resolution, gradient_checkpointing)
        self._is_xl = hasattr(pipeline, "text_encoder_2")
        if self._is_xl:
            self.name = "stable_diffusion_xl"
        check_scheduler(pipeline.scheduler, "beta_start", "DDIMScheduler")
        self._scheduler = ddim_scheduler(pipeline.scheduler.config)
        self._num_timesteps: int = self._scheduler.config.num_train_timesteps
        if self._scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise unknown_name(
                "backbone.checkpoint: scheduler's prediction_type",
                self._scheduler.config.prediction_type,
                "supported",
                ("epsilon", "v_prediction"),
            )
        config = self._scheduler.config
        if config.prediction_type == "epsilon" and config.rescale_betas_zero_snr:
            raise UserError(
                "backbone.checkpoint: its scheduler combines zero terminal SNR (rescale_betas_zero_snr) with "
                "prediction_type epsilon: its last timestep is pure noise, from which no image can be predicted. "
                "If the model predicts v, set prediction_type to v_prediction in scheduler/scheduler_config.json; if "
                "not, set rescale_betas_zero_snr to false."
            )

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """Hidden states [B, S, D] of the prompts, float32; equal ones are encoded once.

        SD1.5: CLIP's last. SDXL: the last but one of both CLIPs, side by side, with the second's pooled embedding; ""
        is all zeros where the checkpoint was trained without guidance text so (`force_zeros_for_empty_prompt`).
        """
        unique = list(dict.fromkeys(prompts))
        rows = [unique.index(prompt) for prompt in prompts]
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            if not self._is_xl:
                embeds, _ = self.pipeline.encode_prompt(unique, self.device, 1, do_classifier_free_guidance=False)
                return Cond(at_least_float32(embeds[rows]), prompts=tuple(prompts))
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                unique, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            if "" in unique and self.pipeline.config.force_zeros_for_empty_prompt:
                embeds[unique.index("")] = 0
                pooled[unique.index("")] = 0
            return Cond(at_least_float32(embeds[rows]), at_least_float32(pooled[rows]), tuple(prompts))

    def timesteps(self, t: Tensor) -> Tensor:
        """The network's timesteps ⌊1000·t⌋ [B] for noise levels t [B] in [0, 1)."""
        # n / 1000 in float32 may lie just below n / 1000; a thousandth of a timestep is far above that error.
        return (
            (t.to(widest_float(t.device)) * self._num_timesteps + 1e-3).floor().long().clamp(0, self._num_timesteps - 1)
        )

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = √ᾱ·x0 + √(1 − ᾱ)·noise [B, C, h, w]."""
        return self._scheduler.add_noise(x0, noise, self.timesteps(t))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, or v = √ᾱ·noise − √(1 − ᾱ)·x0 where the checkpoint predicts that."""
        if self._scheduler.config.prediction_type == "v_prediction":
            return self._scheduler.get_velocity(x0, noise, self.timesteps(t))
        return noise

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The U-Net's prediction [B, C, h, w], in x_t's dtype."""
        dtype = self._dtype
        with self._attention():
            prediction = self.denoiser(
                x_t.to(dtype),
                self.timesteps(t),
                encoder_hidden_states=cond.embeds.to(dtype),
                added_cond_kwargs=self._added(x_t, cond, dtype),
                return_dict=False,
            )[0]
        return prediction.to(x_t.dtype, copy=self.compiled)

    def _added(self, x_t: Tensor, cond: Cond, dtype: torch.dtype) -> dict[str, Tensor] | None:
        if cond.pooled is None:
            return None
        height, width = (side * self.pipeline.vae_scale_factor for side in x_t.shape[2:])
        # Original size, crop, size as drawn: what the pipeline itself says when it is told nothing.
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=x_t.device).expand(len(x_t), -1)
        if cond.crops is not None:
            ids = torch.cat([cond.crops.to(ids), ids[:, 4:]], dim=1)
        return {"text_embeds": cond.pooled.to(dtype), "time_ids": ids}

    def sampler(self, num_steps: int) -> DDIMSampler:
        """DDIM on the pipeline's own noise schedule."""
        return DDIMSampler(self.pipeline.scheduler.config, num_steps, self.device)
