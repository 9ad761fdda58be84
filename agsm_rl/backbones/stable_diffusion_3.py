"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a joint transformer that predicts a flow, two CLIPs and a T5.

The noise level is the flow's own: σ = t, so that x_t = (1 − t)·x0 + t·noise, and the transformer is asked at timestep
1000·t. A recipe's range of t is thus a range of σ, unshifted; only the sampler shifts its schedule.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agsm_rl.adapters.token_places import StreamPlaces, UNetPlace, no_unet
from agsm_rl.backbones.flow_pipeline import FlowPipeline
from agsm_rl.backbones.options import Options
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Cond
from agsm_rl.source_code import takes

LONGEST_TEXT = 512


class StableDiffusion3(FlowPipeline):
    """A frozen StableDiffusion3Pipeline, with its T5 or without.

    Args:
        t5_length: Tokens that the T5 reads, padding included (diffusers' max_sequence_length). Null is 256,
            diffusers' own. Fewer are faster; a plain pipeline must be given the same number to draw the same picture.
    """

    name = "stable_diffusion_3"
    use = "stable_diffusion_3"
    part = "transformer"
    denoiser_class = "SD3Transformer2DModel"
    loads = ("StableDiffusion3Pipeline",)
    wraps = (*loads, "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
    called = ("sd3", "diffusion-3", "sd-3")
    single_files = {"joint_blocks.": "StableDiffusion3Pipeline"}
    single_file_text = {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    }
    drawing = (4.0, 28)  # the figures of arXiv 2605.30038
    t5_length = 256
    """Tokens that the T5 reads, padding included: the pipeline's own default."""

    @takes(Options)
    def __init__(self, checkpoint: str, *, t5_length: int | None = None, **options: Any) -> None:
        if t5_length is not None:
            if not 1 <= t5_length <= LONGEST_TEXT:
                raise UserError(f"backbone.t5_length: got {t5_length}; diffusers allows 1 to {LONGEST_TEXT} tokens.")
            self.t5_length = t5_length
        super().__init__(checkpoint, **options)

    def _longest_side(self, factor: int) -> int:
        """As many patches as its transformer has positions for."""
        positions: int = self.pipeline.transformer.config.pos_embed_max_size
        return min(super()._longest_side(factor), positions * factor * self._patch_size())

    @property
    def call_options(self) -> dict[str, Any]:
        """The picture's size, and how many tokens the T5 reads."""
        return {**super().call_options, "max_sequence_length": self.t5_length}

    def _tokens_read(self, tokenizer: str) -> int:
        return self.t5_length if tokenizer == "tokenizer_3" else super()._tokens_read(tokenizer)

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> StreamPlaces:
        """The first joint blocks: each sees its own tokens after the text, without positions; published: 5."""
        no_unet(places)
        transformer: Any = self.denoiser
        return StreamPlaces(transformer.transformer_blocks, layers, width=transformer.config.caption_projection_dim)

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

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The transformer's flow [B, C, h, w], in x_t's dtype."""
        assert cond.pooled is not None
        dtype = self._dtype
        with self._attention():
            prediction = self.denoiser(
                hidden_states=x_t.to(dtype),
                timestep=t.float() * self._num_timesteps,
                encoder_hidden_states=cond.embeds.to(dtype),
                pooled_projections=cond.pooled.to(dtype),
                return_dict=False,
            )[0]
        return prediction.to(x_t.dtype, copy=self.compiled)
