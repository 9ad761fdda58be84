"""FLUX.1 of Black Forest Labs (2024; arXiv 2506.15742): a joint transformer, a flow, a CLIP and a T5 for its text.

FLUX.1 [dev] is distilled: guidance is an input of its denoiser, `embedded_guidance`, and one branch is predicted. The
`guidance` of rollouts, samples and evaluations is another thing: classifier-free guidance, as everywhere (diffusers'
true_cfg_scale); it is 1, none, where nothing else is said. FLUX.1 [schnell] has no embedded guidance.

Soft tokens enter the first blocks, double-stream ones before single-stream ones, each block's own in front of its text.
Text has no positions in FLUX.1, so neither have they: t = h = w = 0 (rotary_rows.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from agsm_rl.adapters.token_places import StreamPlaces, UNetPlace, no_unet, uncompiled
from agsm_rl.backbones.flow_pipeline import FlowPipeline
from agsm_rl.backbones.options import Options
from agsm_rl.backbones.rotary_rows import drop_from_front, put_in_front
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Cond
from agsm_rl.source_code import takes
from agsm_rl.training.sizes import Resolution

LONGEST_TEXT = 512
PATCH = 2
PUBLISHED_GUIDANCE = 3.5
"""FLUX.1 [dev]'s, in its pipeline and in the trainers that learn from rewards."""


class Flux(FlowPipeline):
    """A frozen FluxPipeline: FLUX.1 [dev] or [schnell].

    Args:
        t5_length: Tokens that the T5 reads, padding included (diffusers' max_sequence_length). Null is 512, diffusers'
            own. Fewer are faster; a plain pipeline must be given the same number to draw the same picture.
        embedded_guidance: The guidance that FLUX.1 [dev]'s denoiser is given as an input, wherever it predicts. Null is
            3.5, with which Flow-GRPO, DanceGRPO and Flow-Factory train and draw. [schnell] has no such input.
        drawn_guidance: The same where the pipeline draws pictures (samples, evaluations). Null is `embedded_guidance`.
            Trainers that learn from images (diffusers' scripts, SimpleTuner) train at 1 and draw at 3.5.
    """

    name = use = "flux"
    part = "transformer"
    denoiser_class = "FluxTransformer2DModel"
    loads = ("FluxPipeline",)
    wraps = (*loads, "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    called = ("flux.1", "flux-1", "flux1")
    t5_length = LONGEST_TEXT
    embedded_guidance: float | None = None
    drawn_guidance: float | None = None

    @takes(Options)
    def __init__(
        self,
        checkpoint: str,
        *,
        t5_length: int | None = None,
        embedded_guidance: float | None = None,
        drawn_guidance: float | None = None,
        **options: Any,
    ) -> None:
        if t5_length is not None:
            if not 1 <= t5_length <= LONGEST_TEXT:
                raise UserError(f"backbone.t5_length: got {t5_length}; diffusers allows 1 to {LONGEST_TEXT} tokens.")
            self.t5_length = t5_length
        self.embedded_guidance, self.drawn_guidance = embedded_guidance, drawn_guidance
        super().__init__(checkpoint, **options)

    def _wrap(self, pipeline: Any, resolution: Resolution | None, gradient_checkpointing: bool) -> None:
        super()._wrap(pipeline, resolution, gradient_checkpointing)
        if pipeline.transformer.config.guidance_embeds:
            if self.embedded_guidance is None:
                self.embedded_guidance = PUBLISHED_GUIDANCE
            if self.drawn_guidance is None:
                self.drawn_guidance = self.embedded_guidance
        self._check_guidance()

    def _check_guidance(self) -> None:
        """UserError for embedded guidance that is no usable number, or that the denoiser does not take."""
        given = {"embedded_guidance": self.embedded_guidance, "drawn_guidance": self.drawn_guidance}
        for name, value in given.items():
            if value is None:
                continue
            if not self.pipeline.transformer.config.guidance_embeds:
                raise UserError(
                    f"backbone.{name}: {value:g}, but the denoiser of this checkpoint has no such input, as FLUX.1 "
                    "[schnell]; leave it out."
                )
            if not 0 <= value < float("inf"):
                raise UserError(f"backbone.{name}: {value:g}; it must be 0 or more (published: {PUBLISHED_GUIDANCE}).")

    @classmethod
    def drawing_by_name(cls, checkpoint: str) -> tuple[float, int]:
        """That of [schnell] where it is called so, else that of [dev]."""
        return (1.0, 4 if "schnell" in checkpoint.lower() else 28)

    @property
    def drawing(self) -> tuple[float, int]:  # type: ignore[override]
        """The pipeline's own; [schnell] is drawn in 4 steps, as in its model card."""
        return (1.0, 28 if self.pipeline.transformer.config.guidance_embeds else 4)

    @property
    def call_options(self) -> dict[str, Any]:
        """The picture's size, how many tokens the T5 reads, and the guidance that the denoiser is told."""
        told = {} if self.drawn_guidance is None else {"guidance_scale": self.drawn_guidance}
        return {**super().call_options, "max_sequence_length": self.t5_length, **told}

    def guidance_arguments(self, guidance: float, negative_prompts: list[str] | None, count: int) -> dict[str, Any]:
        """Classifier-free guidance, which the pipeline has only with negative prompts."""
        return {"true_cfg_scale": guidance, "negative_prompt": negative_prompts or [""] * count}

    def _channels_of_latents(self) -> int:
        return int(self.pipeline.transformer.config.in_channels) // PATCH**2

    def _usual_resolution(self, factor: int) -> int:
        return int(self.pipeline.vae.config.sample_size)

    def _patch_size(self) -> int:
        return PATCH

    def _tokens_read(self, tokenizer: str) -> int:
        return self.t5_length if tokenizer == "tokenizer_2" else super()._tokens_read(tokenizer)

    def _schedule(self, num_steps: int) -> dict[str, Any]:
        return {"sigmas": numpy.linspace(1.0, 1 / num_steps, num_steps)}

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """T5's hidden states [B, t5_length, D] and CLIP's pooled embeddings, float32.

        Equal prompts are encoded once.
        """
        unique = list(dict.fromkeys(prompts))
        rows = [unique.index(prompt) for prompt in prompts]
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            embeds, pooled, _ = self.pipeline.encode_prompt(
                unique, device=self.device, max_sequence_length=self.t5_length
            )
        dtype = torch.promote_types(embeds.dtype, torch.float32)
        return Cond(embeds[rows].to(dtype), pooled[rows].to(dtype), tuple(prompts))

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The transformer's flow [B, C, h, w], in x_t's dtype."""
        assert cond.pooled is not None
        dtype = self._dtype
        patches = pixel_unshuffle(x_t.to(dtype), PATCH)
        height, width = patches.shape[-2:]
        told = self.embedded_guidance
        with self._attention():
            prediction = self.denoiser(
                hidden_states=patches.flatten(2).transpose(1, 2).contiguous(),
                timestep=t.float() * self._num_timesteps / 1000,
                guidance=None if told is None else torch.full((len(x_t),), told, device=x_t.device),
                encoder_hidden_states=cond.embeds.to(dtype),
                pooled_projections=cond.pooled.to(dtype),
                txt_ids=torch.zeros(cond.embeds.shape[1], 3, dtype=torch.long, device=x_t.device),
                img_ids=_positions(height, width, device=x_t.device),
                return_dict=False,
            )[0]
        flow = pixel_shuffle(prediction.transpose(1, 2).unflatten(2, (height, width)), PATCH)
        return flow.to(x_t.dtype, copy=self.compiled)

    def level_of(self, timestep: Tensor) -> Tensor:
        """The denoiser is given timesteps divided by 1000; in float32, as it multiplies them again, none is lost."""
        return (timestep.float() * 1000).to(timestep) / self._num_timesteps

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> StreamPlaces:
        """The first blocks, double-stream ones before single-stream ones; see this file's beginning."""
        no_unet(places)
        transformer: Any = uncompiled(self.denoiser)

        def none_at_all(count: int, device: torch.device) -> Tensor:
            return torch.zeros(count, 3, dtype=torch.long, device=device)

        return StreamPlaces(
            [*transformer.transformer_blocks, *transformer.single_transformer_blocks],
            layers,
            width=transformer.inner_dim,
            lengthen=put_in_front(transformer.pos_embed, none_at_all),
            shorten=drop_from_front,
        )


def _positions(height: int, width: int, *, device: torch.device) -> Tensor:
    """The coordinates (t, h, w) of an image's patches, [N, 3]."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, height, width)))
