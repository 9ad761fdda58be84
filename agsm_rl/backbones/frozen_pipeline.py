"""What all backbones share: a loaded pipeline, frozen and in evaluation mode, and its autoencoder.

What a kind of backbone has of its own, and may override, is in declaration.py.
"""

import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agsm_rl.adapters.token_places import argument_positions
from agsm_rl.backbones import kinds, placement
from agsm_rl.backbones.attention import Attention, choose_attention, remember_signatures
from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.backbones.compiling import compile_denoiser
from agsm_rl.backbones.declaration import Declaration
from agsm_rl.backbones.identity import digest_base, digest_parts
from agsm_rl.backbones.loading import check_finite, find_kind, load_pipeline, unsupported
from agsm_rl.backbones.model_index import BadPart
from agsm_rl.backbones.options import Options, check_device
from agsm_rl.backbones.quantization import read_quantization
from agsm_rl.backbones.text_cache import TextCache
from agsm_rl.backbones.tf32 import allow_tf32, is_tf32_allowed
from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Adapter, Tokens
from agsm_rl.source_code import takes
from agsm_rl.training.precision import own_precision, warn_if_slow, widest_float
from agsm_rl.training.sizes import Resolution, check_resolution

logger = logging.getLogger(__name__)
PIXELS_AT_ONCE = 2 * 1024**2
"""How many pixels the VAE encodes at once: two images of SDXL's size, eight of SD1.5's."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _moved(pipeline: Any, device: str | torch.device, waiting: Collection[str]) -> Any:
    try:
        return placement.move(pipeline, device, waiting)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"backbone.device: {device} cannot be used here ({reason}); leave it out for what this machine has, or "
            "use cpu."
        ) from error


class FrozenPipeline(Declaration):
    """A frozen diffusers pipeline; see `interfaces.Backbone` for the convention.

    UserError when there is no such checkpoint, or it is a pipeline of another kind.
    """

    compiled = False
    """Whether a prediction may be overwritten by the next one (CUDA graphs), and so must be copied."""
    waiting: frozenset[str] = frozenset()
    """Names of the pipeline's parts that are not on the device while the denoiser works (placement.py)."""
    text_cache: TextCache | None = None
    """What encodes texts in place of encoders that stay loaded (text_cache.py)."""
    _chosen_attention: Attention | None = None

    @takes(Options)
    def __init__(self, checkpoint: str, **given: Any) -> None:
        options = Options(checkpoint, **given)
        if options.dtype not in DTYPES:
            raise unknown_name("backbone.dtype", options.dtype, "a dtype", DTYPES)
        pipeline_class = find_kind(checkpoint, local_files_only=options.local_files_only)
        if pipeline_class not in self.wraps:
            other = kinds.kind_of(pipeline_class)
            raise UserError(
                f"backbone.checkpoint: '{checkpoint}' is a {pipeline_class}, which {self.use} does not take; write "
                f"`use: {other.use if other else 'auto'}`."
            )
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        empty = torch.device(check_device(device)).type == "meta"
        dtype = DTYPES[options.dtype]
        warn_if_slow(f"backbone.dtype: {options.dtype}", dtype, torch.device(device))
        load = partial(
            load_pipeline,
            checkpoint,
            pipeline_class=pipeline_class,
            dtype=dtype,
            local_files_only=options.local_files_only,
            denoisers={"unet": options.unet, "transformer": options.transformer},
            lora=options.lora,
            config=options.config,
            empty=empty,
            quantization=read_quantization(options.quantize, dtype=dtype, device=torch.device(device)),
        )
        pipeline = load()
        self.waiting = placement.waiting_parts(pipeline, options)
        if not empty:
            check_finite(pipeline, f"backbone.checkpoint: '{checkpoint}'")
            pipeline = _moved(pipeline, device, self.waiting)
        self._wrap(pipeline, options.resolution, options.gradient_checkpointing)
        if options.allow_tf32:
            allow_tf32(self.device)
        placement.settle(self, options, load)
        if options.scheduler is not None:
            self._draw_by(options.scheduler)
        if options.memory_format is not None:
            self._lay_out(options.memory_format)
        if options.attention is not None:
            self._chosen_attention = choose_attention(
                self.denoiser, options.attention, self.device, masked=self.masks_text
            )
        if options.compile is not None:
            checkpointed = options.gradient_checkpointing
            self.compiled = compile_denoiser(
                self.denoiser, options.compile, self.device, gradient_checkpointing=checkpointed
            )
        self._check_width(checkpoint)

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, *, resolution: Resolution | None = None, gradient_checkpointing: bool = False
    ) -> Self:
        """The backbone of a loaded pipeline; its modules are used in place, and frozen."""
        if type(pipeline).__name__ not in cls.wraps:
            raise unsupported("pipeline", type(pipeline).__name__)
        backbone = cls.__new__(cls)
        backbone._wrap(pipeline, resolution, gradient_checkpointing)
        return backbone

    def _wrap(self, pipeline: Any, resolution: Resolution | None, gradient_checkpointing: bool) -> None:
        self.pipeline: Any = pipeline
        self.denoiser: nn.Module = getattr(pipeline, self.part)
        self._time_position = argument_positions(self.denoiser)[self.time_argument]
        self.adapters: list[Adapter] = []
        self.device = torch.device(pipeline._execution_device)  # an offloaded one's weights wait elsewhere
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        # The text encoders that `pipe.load_lora_weights` can fill: the CLIPs.
        names = [name for name in pipeline._lora_loadable_modules if name.startswith("text_encoder")]
        found = {name: getattr(pipeline, name, None) for name in names}
        self.text_encoders: dict[str, nn.Module] = {name: part for name, part in found.items() if part is not None}
        factor = pipeline.vae_scale_factor
        self.resolution_step, self.longest_side = self._resolution_step(factor), self._longest_side(factor)
        size = check_resolution(
            self._usual_resolution(factor) if resolution is None else resolution,
            multiple=self.resolution_step,
            largest=self.longest_side,
            where="backbone.resolution",
        )
        self.resolution = size.resolution
        try:
            self.autoencoder.check(pipeline.vae.config)
        except BadPart as error:
            raise UserError(f"backbone.checkpoint: {error}") from error
        channels = self.autoencoder.channels(pipeline.vae.config)
        taken = self._channels_of_latents()
        if taken != channels:
            raise UserError(
                f"backbone.checkpoint: the {self.part} takes {taken} channels, but the latents have "
                f"{channels}; inpainting and depth models are not supported."
            )
        self.latent_shape = (channels, size.height // factor, size.width // factor)
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.denoiser, self.adapters, self._attention)
        remember_signatures(self.denoiser)

    @cached_property
    def _vae(self) -> Any:
        """The pipeline's VAE; of SDXL's, which overflows in float16, a float32 copy (the pipeline casts its own)."""
        own = self.pipeline.vae
        if not own.config.get("force_upcast") or own.dtype != torch.float16:
            return own
        made = type(own).from_config(own.config).requires_grad_(False).eval()
        made.load_state_dict(own.state_dict())
        return made.to(self.device)

    def _check_width(self, checkpoint: str) -> None:
        """UserError unless the text encoder's width is what the denoiser's attention expects."""
        wanted = self._text_width()
        got = self.encode_text([" "]).embeds.shape[-1]
        if got != wanted:
            raise UserError(
                f"backbone.checkpoint: '{checkpoint}': its text encoder gives {got} numbers per token, its {self.part} "
                f"expects {wanted}; they belong to different models."
            )

    def _attention(self) -> AbstractContextManager[None]:
        """The attention of predictions, with gradients or without, since log-probabilities are compared across the two.

        It is plain in half precision on a CPU, where fused attention's backward pass costs more than a step's rest.
        """
        if self._chosen_attention is not None:
            return self._chosen_attention()
        if self.device.type != "cpu":
            return nullcontext()
        half = self._dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        return sdpa_kernel(SDPBackend.MATH) if half else nullcontext()

    @property
    def _dtype(self) -> torch.dtype:
        """Of the denoiser's first weight; diffusers' `dtype` looks at every module: 1 % of a small base's step."""
        first = next(self.denoiser.parameters()).dtype
        if first.is_floating_point:
            return first
        denoiser: Any = self.denoiser
        dtype: torch.dtype = denoiser.dtype
        return dtype

    def level_of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """t of a call of the denoiser, 0-d or [B]: by `predict`, or by the pipeline itself.

        Adapters that depend on the noise level read it here: a model's own timesteps may have any unit.
        """
        name = self.time_argument
        time = torch.as_tensor(kwargs[name] if name in kwargs else args[self._time_position])
        return self.level_of(time.to(widest_float(time.device)))

    @property
    def token_limit(self) -> int:
        """Tokens of a prompt that the text encoder with the longest reach reads."""
        return max(limit for _, limit in self._tokenizers())

    def read_tokens(self, prompts: list[str]) -> list[Tokens]:
        """What is read of each prompt: the ids of all tokenizers one after another, each cut at its limit."""
        ids: list[tuple[int, ...]] = [() for _ in prompts]
        is_cut = [True] * len(prompts)
        for tokenizer, limit in self._tokenizers():
            # One token more than is read, so that it shows whether there are more.
            for row, found in enumerate(tokenizer(prompts, truncation=True, max_length=limit + 1)["input_ids"]):
                too_long = len(found) > limit
                end = (found[-1],) if self.ends_text else ()
                ids[row] += (*found[: limit - len(end)], *end) if too_long else tuple(found)
                is_cut[row] &= too_long
        return [Tokens(*row) for row in zip(ids, is_cut, strict=True)]

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """The tokenizers of the text encoders that are there, each with the number of tokens that are read."""
        parts = self.pipeline.components
        names = [name for name in parts if name.startswith("tokenizer") and parts[name] is not None]
        used = [name for name in names if parts.get(name.replace("tokenizer", "text_encoder")) is not None]
        return [(parts[name], self._tokens_read(name)) for name in used]

    def identity(self, of: Literal["images", "text"]) -> str:
        """A digest of all that `encode_images` or `encode_text` depends on; adapters of the text encoders are not."""
        if of == "text" and self.text_cache is not None and self.text_cache.identity:
            return self.text_cache.identity  # the encoders may be gone
        prefixes: tuple[str, ...] = ("vae",)
        options: dict[str, Any] = {"backbone": self.name, "resolution": self.resolution, "dtype": str(self._vae.dtype)}
        if of == "text":
            prefixes = ("text_encoder", "tokenizer")
            options = {
                "backbone": self.name,
                "t5_length": self.call_options.get("max_sequence_length"),
                "zeros_for_empty": self.pipeline.config.get("force_zeros_for_empty_prompt"),
                **self._text_options(),
            }
        elif getattr(self._vae, "use_tiling", False):
            options["tiling"] = True
        if is_tf32_allowed(self.device):
            options["tf32"] = True
        components = self.pipeline.components.items()
        parts = {name: part for name, part in components if name.startswith(prefixes) and part is not None}
        return digest_parts(parts, options)

    def drawing_identity(self) -> str:
        """A digest of the weights and settings that decide what is drawn with all adapters off, sizes aside."""
        parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
        options: dict[str, Any] = {"backbone": self.name, "pipeline": type(self.pipeline).__name__}
        options |= {"dtype": str(self.pipeline.dtype), "tf32": is_tf32_allowed(self.device)}
        if self.text_cache is not None and self.text_cache.identity:  # the encoders may be gone
            parts = {name: part for name, part in parts.items() if not name.startswith("text_encoder")}
            options["text"] = self.text_cache.identity
        return digest_base(parts, options)

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → the posterior's mode [B, C, h, w], scaled as the denoiser wants it.

        With standard normal `noise` [B, C, h, w], the posterior's sample mean + std · noise.

        In the VAE's own precision, whatever the run's: it is what latents that are kept are made in. Large images go a
        few at a time, so that encoding is no peak of memory.
        """
        at_once = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
        parts, noises = images.split(at_once), None if noise is None else noise.split(at_once)
        encoded = []
        with own_precision(self.device):
            for number, part in enumerate(parts):
                posterior = self.autoencoder.encode(self._vae, (2 * part - 1).to(self.device, self._vae.dtype))
                encoded.append(posterior.mode if noises is None else posterior.sample(noises[number]))
        return self.autoencoder.scale(torch.cat(encoded), self._vae).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] → images [B, 3, H, W], clamped to [0, 1]; no gradient comes from clamped pixels."""
        unscaled = self.autoencoder.unscale(latents, self._vae)
        images = self.autoencoder.decode(self._vae, unscaled.to(self._vae.dtype)).to(latents.dtype)
        return (images / 2 + 0.5).clamp(0, 1)
