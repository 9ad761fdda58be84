"""Qwen-Image (arXiv 2508.02324): a joint transformer that predicts a flow, and a Qwen2.5-VL that reads the prompt.

What is particular to diffusers' transformer and pipeline stays in here: latents are packed in patches of 2 x 2, the VAE
is one of videos, a template goes around each prompt whose own tokens are dropped again, and guidance keeps the length
of the conditional prediction, patch by patch.

Soft tokens stand behind the text of the first blocks. They share the rotary position of the text's first token, so that
neither the prompt's length nor a batch's padding moves them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agsm_rl.adapters.token_places import BlockCall, StreamPlaces, UNetPlace, drop_from_text, no_unet
from agsm_rl.backbones.autoencoders import ChannelStatistics
from agsm_rl.backbones.flow_pipeline import FlowPipeline
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Combine, Cond, Tokens
from agsm_rl.training.precision import at_least_float32
from agsm_rl.training.sizes import Resolution

TEXT_LENGTH = 512
"""Tokens of the text that the transformer sees: the pipeline's default."""
PATCH = 2


class QwenImage(FlowPipeline):
    """A frozen QwenImagePipeline."""

    name = "qwen_image"
    use = "qwen_image"
    part = "transformer"
    denoiser_class = "QwenImageTransformer2DModel"
    loads = ("QwenImagePipeline",)
    wraps = (*loads, "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    called = ("qwen-image",)
    interface = ("in_channels", "out_channels", "joint_attention_dim", "guidance_embeds")
    autoencoder = ChannelStatistics(channels="z_dim", frames=True)
    ends_text = False
    masks_text = True
    drawing = (4.0, 50)  # the pipeline's own

    def _wrap(self, pipeline: Any, resolution: Resolution | None, gradient_checkpointing: bool) -> None:
        super()._wrap(pipeline, resolution, gradient_checkpointing)
        if pipeline.transformer.config.guidance_embeds:
            raise UserError(
                "backbone.checkpoint: its transformer has guidance_embeds, guidance as an input, which diffusers' "
                "QwenImageTransformer2DModel cannot compute; use a checkpoint without."
            )

    def guidance_arguments(self, guidance: float, negative_prompts: list[str] | None, count: int) -> dict[str, Any]:
        """`true_cfg_scale`; without negative prompts, the pipeline does not guide at all."""
        if guidance <= 1:
            return {"true_cfg_scale": guidance}
        return {"true_cfg_scale": guidance, "negative_prompt": negative_prompts or [""] * count}

    @property
    def combine(self) -> Combine:
        """The pipeline's guidance."""
        return _guide

    def _patch_size(self) -> int:
        return PATCH

    def _channels_of_latents(self) -> int:
        return super()._channels_of_latents() // PATCH**2

    def _usual_resolution(self, factor: int) -> int:
        return int(self.pipeline.default_sample_size * factor)

    def _schedule(self, num_steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)}

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> StreamPlaces:
        """The first joint blocks: each its own tokens behind the text, at the position of the text's first token."""
        no_unet(places)
        transformer: Any = self.denoiser
        blocks, width = transformer.transformer_blocks, transformer.inner_dim
        return StreamPlaces(blocks, layers, width=width, lengthen=_append, shorten=drop_from_text)

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """Qwen2.5-VL's last hidden states [B, S, D] of the prompts in the template, without its head; float32.

        Equal prompts are encoded once, and each by itself: padding would have the numbers depend on the others.
        """
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            conds = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
            return Cond.cat([conds[prompt] for prompt in prompts])

    def _encode(self, prompt: str) -> Cond:
        ids = torch.tensor(self._tokens([prompt])["input_ids"], device=self.device)
        states = self.pipeline.text_encoder(
            input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1
        ).hidden_states[-1]
        read = states[:, self.pipeline.prompt_template_encode_start_idx :][:, :TEXT_LENGTH]
        return Cond(at_least_float32(read), prompts=(prompt,), combine=self.combine)

    def read_tokens(self, prompts: list[str]) -> list[Tokens]:
        """What is read of each prompt, with the template's end."""
        head = self.pipeline.prompt_template_encode_start_idx
        rows = [ids[head:] for ids in self._tokens(prompts)["input_ids"]]
        return [Tokens(tuple(row[:TEXT_LENGTH]), len(row) > TEXT_LENGTH) for row in rows]

    def _tokens(self, prompts: list[str]) -> Any:
        """The prompts in the template as the pipeline's encode_prompt tokenizes them."""
        pipeline = self.pipeline
        longest = pipeline.tokenizer_max_length + pipeline.prompt_template_encode_start_idx
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        return pipeline.tokenizer(texts, max_length=longest, truncation=True)

    def _tokens_read(self, tokenizer: str) -> int:
        (empty,) = self.read_tokens([""])
        return TEXT_LENGTH - len(empty.ids)

    def level_of(self, timestep: Tensor) -> Tensor:
        """The transformer is asked at t itself."""
        return timestep

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The transformer's flow [B, C, h, w], in x_t's dtype."""
        dtype = self._dtype
        _, height, width = x_t.shape[1:]
        with self._attention():
            flow = self.denoiser(
                hidden_states=_pack(x_t.to(dtype)),
                timestep=(t.float() * self._num_timesteps).to(dtype) / 1000,
                encoder_hidden_states=cond.embeds.to(dtype),
                encoder_hidden_states_mask=cond.mask,
                img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_t),
                return_dict=False,
            )[0]
        return _unpack(flow, x_t.shape[1:]).to(x_t.dtype, copy=self.compiled)


def _pack(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as patches [B, h/2 · w/2, 4·C]."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH**2)


def _unpack(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `_pack`, for latents of this shape (C, h, w)."""
    channels, height, width = shape
    latents = patches.view(len(patches), height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), channels, height, width)


def _guide(uncond: Tensor, cond: Tensor, scale: float, t: Tensor) -> Tensor:
    """Classifier-free guidance, each patch as long as the conditional prediction's [B, C, h, w]."""
    guided = _pack(uncond + scale * (cond - uncond))
    norms, guided_norms = (torch.norm(part, dim=-1, keepdim=True) for part in (_pack(cond), guided))
    return _unpack(guided * (norms / guided_norms), cond.shape[1:])


def _append(call: BlockCall, rows: Tensor) -> None:
    """The rows behind the text: seen by all, and rotated as the text's first token is."""
    call.set("encoder_hidden_states", torch.cat([call.get("encoder_hidden_states"), rows], dim=1))
    mask, (image, text) = call.get("encoder_hidden_states_mask"), call.get("image_rotary_emb")
    if mask is not None:
        call.set("encoder_hidden_states_mask", torch.cat([mask, mask.new_ones(rows.shape[:2])], dim=1))
    call.set("image_rotary_emb", (image, torch.cat([text, text[:1].expand(rows.shape[1], -1)])))
