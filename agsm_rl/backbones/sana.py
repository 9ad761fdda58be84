"""SANA and SANA-1.5 (arXiv 2410.10629, 2501.18427): a linear transformer on the latents of a deep autoencoder.

It predicts a flow, and reads its text, which a Gemma-2 has encoded, by cross-attention. Prompts go behind SANA's
"complex human instruction"; the empty prompt of guidance's unconditional branch goes without, as in diffusers.
"""

from collections.abc import Sequence
from inspect import signature
from math import lcm
from typing import Any

import numpy
import torch
from diffusers import SanaPipeline
from torch import Tensor

from agsm_rl.adapters.token_places import BlockCall, StreamPlaces, UNetPlace, no_unet
from agsm_rl.backbones.autoencoders import NoPosterior
from agsm_rl.backbones.flow_pipeline import FlowPipeline
from agsm_rl.backbones.options import Options
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Cond
from agsm_rl.source_code import takes
from agsm_rl.training.precision import at_least_float32

INSTRUCTION = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
LONGEST_TEXT = 4096
"""Far beyond what the model was trained with (300)."""


class Sana(FlowPipeline):
    """A frozen SanaPipeline.

    Args:
        text_length: Rows of text that the transformer sees of a prompt, padding included (diffusers'
            max_sequence_length). Null is 300, as published.
        human_instruction: Put diffusers' instruction to enhance the prompt before it. Null is true, as the
            pipeline draws; false, as SANA's authors post-train, makes encoding several times as fast.
    """

    name = "sana"
    use = "sana"
    part = "transformer"
    denoiser_class = "SanaTransformer2DModel"
    wraps = ("SanaPipeline", "SanaPAGPipeline")
    loads = ("SanaPipeline",)
    called = ("sana",)
    autoencoder = NoPosterior()
    ends_text = False
    masks_text = True
    drawing = (4.5, 20)  # diffusers' defaults
    text_length = 300
    human_instruction = True

    @takes(Options)
    def __init__(
        self,
        checkpoint: str,
        *,
        text_length: int | None = None,
        human_instruction: bool | None = None,
        **options: Any,
    ) -> None:
        self.human_instruction = human_instruction is not False
        if text_length is not None:
            if not 2 <= text_length <= LONGEST_TEXT:
                raise UserError(f"backbone.text_length: got {text_length}; allowed: 2 to {LONGEST_TEXT}.")
            self.text_length = text_length
        super().__init__(checkpoint, **options)

    @property
    def call_options(self) -> dict[str, Any]:
        """The picture's exact size, and how much text is read."""
        options: dict[str, Any] = {"use_resolution_binning": False, "max_sequence_length": self.text_length}
        return {**super().call_options, **options} | (
            {} if self.human_instruction else {"complex_human_instruction": None}
        )

    def _text_options(self) -> dict[str, Any]:
        return {"human_instruction": self.human_instruction}

    def guidance_arguments(self, guidance: float, negative_prompts: list[str] | None, count: int) -> dict[str, Any]:
        """As usual, but the pipeline does not take None for the empty prompt."""
        return super().guidance_arguments(guidance, negative_prompts or [""] * count, count)

    def _resolution_step(self, factor: int) -> int:
        return lcm(super()._resolution_step(factor), 32)  # diffusers' pipeline draws no others

    def _patch_size(self) -> int:
        return int(self.pipeline.transformer.config.patch_size)

    def _text_width(self) -> int:
        return int(self.pipeline.transformer.config.caption_channels)

    def _tokens_read(self, tokenizer: str) -> int:
        # The first row is BOS's; behind the instruction, the next one is its end.
        return self.text_length - 1 if self.human_instruction else self.text_length

    def _flow_config(self, scheduler: Any) -> dict[str, Any]:
        """Published checkpoints come with a DPM-Solver on a flow's noise levels, with the shift `flow_shift`."""
        config = scheduler.config
        if not config.get("use_flow_sigmas"):
            return super()._flow_config(scheduler)
        return {"shift": config["flow_shift"], "num_train_timesteps": config["num_train_timesteps"]}

    def _schedule(self, num_steps: int) -> dict[str, Any]:
        config = self.pipeline.scheduler.config
        if not config.get("use_flow_sigmas"):
            return super()._schedule(num_steps)
        # DPM-Solver's noise levels before the shift: the highest is a little below 1.
        unshifted = 1 - numpy.linspace(1, 1 / config["num_train_timesteps"], num_steps + 1)
        return {"sigmas": numpy.flip(unshifted)[:-1].copy()}

    def level_of(self, timestep: Tensor) -> Tensor:
        """The transformer may count time in another unit (`timestep_scale`)."""
        return super().level_of(timestep) / self._time_scale

    @property
    def _time_scale(self) -> float:
        return float(self.pipeline.transformer.config.timestep_scale)

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> StreamPlaces:
        """The cross-attention of the first blocks: each sees its own tokens after the text."""
        no_unet(places)
        config = self.pipeline.transformer.config
        return StreamPlaces(
            self.pipeline.transformer.transformer_blocks,
            layers,
            width=config.num_attention_heads * config.attention_head_dim,
            lengthen=_lengthen,
            shorten=None,  # a block returns the image alone
        )

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """Gemma's hidden states [B, 300, D], float32, with their mask; equal prompts are encoded once."""
        encoded: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            unique = list(dict.fromkeys(prompts))
            told = [prompt for prompt in unique if prompt and self.human_instruction]
            for group, instruction in ((told, INSTRUCTION), ([each for each in unique if each not in told], None)):
                if group:
                    encoded |= self._encoded(group, instruction)
        embeds, mask = (torch.stack(rows) for rows in zip(*(encoded[prompt] for prompt in prompts), strict=True))
        return Cond(at_least_float32(embeds), prompts=tuple(prompts), mask=mask.bool())

    def encode_negative(self, prompt: str) -> Cond:
        """Without the instruction, whatever the prompt."""
        with torch.no_grad():
            embeds, mask = self._encoded([prompt], None)[prompt]
        return Cond(at_least_float32(embeds[None]), prompts=(prompt,), mask=mask[None].bool())

    def _encoded(self, prompts: list[str], instruction: list[str] | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Hidden states [300, D] and mask [300] of each prompt, behind the instruction or alone."""
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.text_length,
            complex_human_instruction=instruction,
        )
        return dict(zip(prompts, zip(embeds, mask, strict=True), strict=True))

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The transformer's flow [B, C, h, w], in x_t's dtype."""
        dtype = self._dtype
        with self._attention():
            prediction = self.denoiser(
                x_t.to(dtype),
                encoder_hidden_states=cond.embeds.to(dtype),
                encoder_attention_mask=None if cond.mask is None else cond.mask.long(),
                timestep=t.float() * self._num_timesteps * self._time_scale,
                return_dict=False,
            )[0]
        return prediction.to(x_t.dtype, copy=self.compiled)


def _lengthen(call: BlockCall, rows: Tensor) -> None:
    """The rows after the text; in a block, the mask is a bias [B, 1, S] on attention's scores: 0 is seen."""
    call.set("encoder_hidden_states", torch.cat([call.get("encoder_hidden_states"), rows], dim=1))
    bias = call.get("encoder_attention_mask")
    if bias is not None:
        seen = bias.new_zeros(*bias.shape[:-1], rows.shape[1])
        call.set("encoder_attention_mask", torch.cat([bias, seen], dim=-1))
