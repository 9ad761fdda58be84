"""FLUX.2 [klein] of Black Forest Labs (2026): a joint transformer that predicts a flow, and a Qwen3 for its text.

Latents are 2 x 2 patches of the VAE's, normalised by the running statistics of its batch norm: 4 · 32 channels, 16
pixels a side. The schedule is shifted by the number of image tokens and of steps. Nothing of a prompt is masked: the
padding up to `text_length` is part of what the model reads.

Soft tokens enter the first blocks, double-stream ones before single-stream ones, each block's own in front of its text.
Their rotary positions follow the longest text's, l = 512, 513, …, whatever the length of this one (rotary_rows.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from agsm_rl.adapters.token_places import StreamPlaces, UNetPlace, no_unet, uncompiled
from agsm_rl.backbones.autoencoders import Posterior, Standardised, is_finite
from agsm_rl.backbones.flow_pipeline import FlowPipeline
from agsm_rl.backbones.model_index import BadPart
from agsm_rl.backbones.options import Options
from agsm_rl.backbones.rotary_rows import drop_from_front, put_in_front
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Cond, Tokens
from agsm_rl.source_code import takes
from agsm_rl.training.sizes import Resolution

LONGEST_TEXT = 512
PATCH = 2
READ_LAYERS = (9, 18, 27)
"""The text encoder's hidden states that are the text, side by side: the pipeline's text_encoder_out_layers."""
TEXTS_AT_ONCE = 8
"""Prompts that are encoded in one pass, since all hidden states of all layers are kept until its end."""


class PatchStatistics(Standardised):
    """FLUX.2's: its latents in patches, each channel of a patch normalised by the batch norm's running statistics."""

    def channels(self, config: Any) -> int:
        """C of a patch."""
        return int(config.latent_channels) * PATCH**2

    def check(self, config: Any) -> None:
        """BadPart for another patch size, or an epsilon that is no usable number."""
        epsilon, patch = config.get("batch_norm_eps"), config.get("patch_size")
        if not is_finite(epsilon) or epsilon < 0:
            raise BadPart(f"its vae's config.json has batch_norm_eps {epsilon!r:.80}; it must be a number, 0 or more.")
        if list(patch or ()) != [PATCH, PATCH]:
            raise BadPart(f"its vae's config.json has patch_size {patch!r:.80}; it must be [{PATCH}, {PATCH}].")

    def encode(self, vae: Any, pixels: Tensor) -> Posterior:
        """The posterior in patches."""
        mode, mean, std = super().encode(vae, pixels)
        assert std is not None
        return Posterior(*(pixel_unshuffle(part, PATCH) for part in (mode, mean, std)))

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Of patches."""
        return super().decode(vae, pixel_shuffle(latents, PATCH))

    def _statistics(self, latents: Tensor, vae: Any) -> tuple[Tensor, Tensor]:
        mean, variance = vae.bn.running_mean, vae.bn.running_var + vae.config.batch_norm_eps
        return mean.view(1, -1, 1, 1).to(latents), variance.sqrt().view(1, -1, 1, 1).to(latents)


class Flux2Klein(FlowPipeline):
    """A frozen Flux2KleinPipeline: FLUX.2 [klein] base (4B or 9B), or distilled, which is drawn without guidance.

    Args:
        text_length: Tokens of a prompt that are read, those of the chat around it and the padding included (diffusers'
            max_sequence_length). Null is 512, diffusers' own. Fewer are faster, but the padding is not masked: a plain
            pipeline must be given the same number to draw the same picture.
    """

    name = use = "flux_2"
    part = "transformer"
    denoiser_class = "Flux2Transformer2DModel"
    loads = ("Flux2KleinPipeline",)
    wraps = (*loads, "Flux2KleinInpaintPipeline")
    called = ("flux.2", "flux-2", "flux2")
    autoencoder = PatchStatistics()
    ends_text = False
    text_length = LONGEST_TEXT

    @takes(Options)
    def __init__(self, checkpoint: str, *, text_length: int | None = None, **options: Any) -> None:
        if text_length is not None:
            if not 1 <= text_length <= LONGEST_TEXT:
                raise UserError(f"backbone.text_length: got {text_length}; 1 to {LONGEST_TEXT} tokens are allowed.")
            self.text_length = text_length
        super().__init__(checkpoint, **options)

    def _wrap(self, pipeline: Any, resolution: Resolution | None, gradient_checkpointing: bool) -> None:
        super()._wrap(pipeline, resolution, gradient_checkpointing)
        chat = len(pipeline.tokenizer(self._as_chats([""]))["input_ids"][0])
        if self.text_length <= chat:
            raise UserError(
                f"backbone.text_length: got {self.text_length}, but the chat around a prompt takes {chat} tokens, so "
                f"none of the prompt would be read; give more, up to {LONGEST_TEXT}."
            )
        channels, height, width = self.latent_shape
        self.latent_shape = (channels, height // PATCH, width // PATCH)
        # Single-stream blocks fuse their projections, and their to_out is not a list: as in diffusers' own script.
        single = range(pipeline.transformer.config.num_single_layers)
        outputs = [f"single_transformer_blocks.{block}.attn.to_out" for block in single]
        self.lora_targets = (*type(self).lora_targets, "to_qkv_mlp_proj", *outputs)

    @classmethod
    def drawing_by_name(cls, checkpoint: str) -> tuple[float, int]:
        """That of a base where it is called so, else that of a distilled checkpoint."""
        return (4.0, 50) if "base" in checkpoint.lower() else (1.0, 4)

    @property
    def drawing(self) -> tuple[float, int]:  # type: ignore[override]
        """As in the model cards: guidance 4 and 50 steps; distilled, 4 steps without guidance."""
        return (1.0, 4) if self.pipeline.config.is_distilled else (4.0, 50)

    @property
    def call_options(self) -> dict[str, Any]:
        """The picture's size, and how many tokens are read."""
        return {**super().call_options, "max_sequence_length": self.text_length}

    def guidance_arguments(self, guidance: float, negative_prompts: list[str] | None, count: int) -> dict[str, Any]:
        """The pipeline takes negative prompts encoded only; a distilled one draws without guidance."""
        if guidance > 1 and self.pipeline.config.is_distilled:
            raise UserError(
                f"guidance: {guidance:g}, but this FLUX.2 is distilled to be drawn without guidance; write 1, or train "
                "and draw with a base checkpoint (FLUX.2-klein-base-4B)."
            )
        if guidance <= 1 or negative_prompts is None:
            return {"guidance_scale": guidance}
        cond = self.encode_text(negative_prompts)
        return {"guidance_scale": guidance, "negative_prompt_embeds": cond.embeds.to(self.pipeline.text_encoder.dtype)}

    def _usual_resolution(self, factor: int) -> int:
        return int(self.pipeline.vae.config.sample_size)

    def _patch_size(self) -> int:
        return PATCH

    def _image_tokens(self) -> int:
        return math.prod(self.latent_shape[1:])

    def _schedule(self, num_steps: int) -> dict[str, Any]:
        return {
            "sigmas": numpy.linspace(1.0, 1 / num_steps, num_steps),
            "mu": compute_empirical_mu(self._image_tokens(), num_steps),
        }

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """Three of Qwen3's hidden states side by side [B, text_length, 3·D], float32.

        Equal prompts are encoded once.
        """
        unique = list(dict.fromkeys(prompts))
        rows = [unique.index(prompt) for prompt in prompts]
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            parts = [unique[start : start + TEXTS_AT_ONCE] for start in range(0, len(unique), TEXTS_AT_ONCE)]
            embeds = torch.cat([self._hidden_states(part) for part in parts])[rows]
        return Cond(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), prompts=tuple(prompts))

    def _hidden_states(self, prompts: list[str]) -> Tensor:
        """[B, text_length, 3·D], as the pipeline's encode_prompt gives them, but without a language model's logits."""
        read = self.pipeline.tokenizer(
            self._as_chats(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.text_length,
            return_tensors="pt",
        )
        mask = read.attention_mask.to(self.device)
        if mask.is_meta:  # transformers would ask what it holds, but not of one with heads, which is taken as it is
            mask = mask.new_ones(1, 1, 1, 1, dtype=torch.bool)
        states = self.pipeline.text_encoder(
            input_ids=read.input_ids.to(self.device),
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        ).hidden_states
        return torch.cat([states[layer] for layer in READ_LAYERS], dim=-1)

    def _as_chats(self, prompts: list[str]) -> list[str]:
        """Each prompt as a user's message to Qwen3, which is to answer without thinking."""
        return [
            self.pipeline.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]

    def _tokens_read(self, tokenizer: str) -> int:
        return self.text_length

    def read_tokens(self, prompts: list[str]) -> list[Tokens]:
        """What is read of each prompt, with the chat around it."""
        found = self.pipeline.tokenizer(self._as_chats(prompts))["input_ids"]
        return [Tokens(tuple(ids[: self.text_length]), len(ids) > self.text_length) for ids in found]

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The transformer's flow [B, C, h, w], in x_t's dtype."""
        dtype = self._dtype
        height, width = x_t.shape[-2:]
        with self._attention():
            prediction = self.denoiser(
                hidden_states=x_t.to(dtype).flatten(2).transpose(1, 2),
                timestep=t.float() * self._num_timesteps / 1000,
                encoder_hidden_states=cond.embeds.to(dtype),
                txt_ids=_positions(1, 1, 1, cond.embeds.shape[1], device=x_t.device),
                img_ids=_positions(1, height, width, 1, device=x_t.device),
                return_dict=False,
            )[0]
        return prediction.transpose(1, 2).unflatten(2, (height, width)).to(x_t.dtype, copy=self.compiled)

    def level_of(self, timestep: Tensor) -> Tensor:
        """The denoiser is given timesteps divided by 1000; in float32, as it multiplies them again, none is lost."""
        return (timestep.float() * 1000).to(timestep) / self._num_timesteps

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> StreamPlaces:
        """The first blocks, double-stream ones before single-stream ones; see this file's beginning."""
        no_unet(places)
        transformer: Any = uncompiled(self.denoiser)

        def behind_the_longest(count: int, device: torch.device) -> Tensor:
            return _positions(1, 1, 1, LONGEST_TEXT + count, device=device)[LONGEST_TEXT:]

        return StreamPlaces(
            [*transformer.transformer_blocks, *transformer.single_transformer_blocks],
            layers,
            width=transformer.inner_dim,
            stream="hidden_states",
            lengthen=put_in_front(transformer.pos_embed, behind_the_longest),
            shorten=drop_from_front,
        )


def _positions(*sizes: int, device: torch.device) -> Tensor:
    """The coordinates (t, h, w, l) of all rows of a stream of these sizes, [N, 4]."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
