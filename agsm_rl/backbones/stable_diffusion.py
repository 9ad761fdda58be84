"""Stable Diffusion 1.5's layout behind the Backbone convention (arXiv 2112.10752): a U-Net on latents, one CLIP.

Everything in it is frozen and in evaluation mode. Callers see images in [0, 1] and t in [0, 1); whether the network
predicts the noise or v (arXiv 2202.00512) is settled here, from the scheduler's configuration.
"""

from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.backbones.ddim import DDIMSampler, ddim_scheduler
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Adapter, Cond

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILTINS = Path(__file__).parents[1] / "shapes" / "checkpoints"
SUPPORTED = "StableDiffusionPipeline"


class StableDiffusion:
    """A frozen StableDiffusionPipeline; see `interfaces.Backbone` for the convention.

    checkpoint: a pipeline folder, a hub id, or `builtin:shapes-sd15`.
    resolution: pixels a side; the checkpoint's own (512 for SD1.5) when left out.
    dtype: of the frozen weights. Latents and predictions keep the caller's dtype, float32, which the losses need.
    gradient_checkpointing: trade a second forward pass for memory.
    device: the first GPU where there is one, when left out.
    local_files_only: never ask the hub.
    Raises UserError when there is no such checkpoint, or it is a pipeline of another kind.
    """

    name = "stable_diffusion"

    def __init__(
        self,
        checkpoint: str,
        *,
        resolution: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        device: str | torch.device | None = None,
        local_files_only: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise unknown_name("backbone.dtype", dtype, "a dtype", DTYPES)
        pipeline = load_pipeline(checkpoint, DTYPES[dtype], local_files_only)
        pipeline = pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._wrap(pipeline, resolution, gradient_checkpointing)

    @classmethod
    def from_pipeline(
        cls, pipeline: StableDiffusionPipeline, *, resolution: int | None = None, gradient_checkpointing: bool = False
    ) -> Self:
        """The backbone of a pipeline that is loaded already; its modules are used as they are, and frozen."""
        if type(pipeline).__name__ != SUPPORTED:
            raise _unsupported("pipeline", type(pipeline).__name__)
        backbone = cls.__new__(cls)
        backbone._wrap(pipeline, resolution, gradient_checkpointing)
        return backbone

    def _wrap(self, pipeline: Any, resolution: int | None, gradient_checkpointing: bool) -> None:
        self.pipeline: Any = pipeline
        self.denoiser: nn.Module = pipeline.unet
        self.adapters: list[Adapter] = []
        self.device = torch.device(pipeline.device)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        factor = pipeline.vae_scale_factor
        self.resolution = resolution or pipeline.unet.config.sample_size * factor
        if self.resolution % factor:
            raise UserError(f"backbone.resolution: {resolution} is not a multiple of {factor}, the size of a latent.")
        channels = pipeline.vae.config.latent_channels
        if pipeline.unet.config.in_channels != channels:
            raise UserError(
                f"backbone.checkpoint: the U-Net takes {pipeline.unet.config.in_channels} channels where the latents "
                f"have {channels}; inpainting and depth models are not supported."
            )
        self.latent_shape = (channels, self.resolution // factor, self.resolution // factor)
        self._scheduler = ddim_scheduler(pipeline.scheduler.config)
        self._num_timesteps: int = self._scheduler.config.num_train_timesteps
        if self._scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise unknown_name(
                "backbone.checkpoint: scheduler's prediction_type",
                self._scheduler.config.prediction_type,
                "supported",
                ("epsilon", "v_prediction"),
            )
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.denoiser, self.adapters)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Cond:
        """Last hidden states [B, S, D] of the prompts, float32; equal ones are encoded once."""
        unique = list(dict.fromkeys(prompts))
        embeds, _ = self.pipeline.encode_prompt(unique, self.device, 1, do_classifier_free_guidance=False)
        rows = [unique.index(prompt) for prompt in prompts]
        return Cond(embeds[rows].to(torch.promote_types(embeds.dtype, torch.float32)))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → the posterior's mode [B, C, h, w], scaled as the denoiser wants it."""
        vae, config = self.pipeline.vae, self.pipeline.vae.config
        latents = vae.encode((2 * images - 1).to(self.device, vae.dtype)).latent_dist.mode()
        return ((latents - (config.shift_factor or 0.0)) * config.scaling_factor).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] → images [B, 3, H, W], clamped to [0, 1]; no gradient comes from clamped pixels."""
        vae, config = self.pipeline.vae, self.pipeline.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].to(latents.dtype)
        return (images / 2 + 0.5).clamp(0, 1)

    def timesteps(self, t: Tensor) -> Tensor:
        """The network's timesteps ⌊1000·t⌋ [B] for noise levels t [B] in [0, 1)."""
        # n / 1000 in float32 may lie just below n / 1000; a thousandth of a timestep is far above that error.
        return (t.double() * self._num_timesteps + 1e-3).floor().long().clamp(0, self._num_timesteps - 1)

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
        dtype = self.pipeline.unet.dtype
        prediction = self.denoiser(
            x_t.to(dtype), self.timesteps(t), encoder_hidden_states=cond.embeds.to(dtype), return_dict=False
        )[0]
        return prediction.to(x_t.dtype)

    def sampler(self, num_steps: int) -> DDIMSampler:
        """DDIM on the pipeline's own noise schedule."""
        return DDIMSampler(self.pipeline.scheduler.config, num_steps, self.device)


def find_checkpoint(checkpoint: str) -> str:
    """The folder of a `builtin:` name; anything else as it is. UserError for a builtin that does not exist."""
    if not checkpoint.startswith("builtin:"):
        return checkpoint
    name = checkpoint.removeprefix("builtin:")
    there = {path.parent.name for path in BUILTINS.glob("*/model_index.json")}
    if name not in there:
        raise unknown_name("backbone.checkpoint", checkpoint, "a builtin base", {f"builtin:{one}" for one in there})
    return str(BUILTINS / name)


def load_pipeline(checkpoint: str, dtype: torch.dtype, local_files_only: bool) -> Any:
    """The StableDiffusionPipeline without its safety checker; UserError if it cannot be had or is of another kind."""
    source = find_checkpoint(checkpoint)
    where = f"backbone.checkpoint: '{checkpoint}'"
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise UserError(f"{where} is a folder without a model_index.json; give the folder of a diffusers pipeline.")
    try:
        kind = StableDiffusionPipeline.load_config(source, local_files_only=local_files_only).get("_class_name")
        if kind != SUPPORTED:
            raise _unsupported(where, str(kind))
        pipeline = StableDiffusionPipeline.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,  # a pickled checkpoint could run code
            local_files_only=local_files_only,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{where} cannot be loaded: {error}\nGive an existing pipeline folder, a hub id (owner/name), or "
            "builtin:shapes-sd15."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unsupported(where: str, kind: str) -> UserError:
    return UserError(f"{where} is a {kind}; supported: {SUPPORTED} (the layout of Stable Diffusion 1.5).")
