"""Z-Image and Z-Image-Turbo (arXiv 2511.22699): one sequence of image and text, and a Qwen3 that reads the prompt.

What is particular to diffusers' transformer and pipeline stays in here: it takes and returns lists of images, each with
a caption of its own length, is asked at 1 − t, and predicts x0 − noise; the pipeline's guidance is one below the usual.

Soft tokens stand behind image and text in the sequence of the first blocks, at the rotary position (0, 0, 0): just
before the text, which begins at (1, 0, 0), so that their place does not depend on the prompt's length.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agsm_rl.adapters.token_places import BlockCall, StreamPlaces, UNetPlace, no_unet
from agsm_rl.backbones.flow_pipeline import FlowPipeline
from agsm_rl.backbones.options import Options
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Combine, Cond, Tokens
from agsm_rl.source_code import takes
from agsm_rl.training.guidance import Arguments, Branches
from agsm_rl.training.precision import at_least_float32, widest_float

TEXT_LENGTH = 512
"""Tokens that are read of a prompt with its chat marks: the pipeline's default."""
TURBO_SHIFT = 3.0
"""How far Turbo's scheduler shifts its noise levels; the base's shifts by 6."""
WITHOUT_MASK = {"full_attention": None, "sliding_attention": None}
"""For Qwen3: each kind of its layers sees everything."""
TEXTS_AT_ONCE = 8
"""Prompts that are encoded in one pass: the hidden states of all 36 layers are kept until its end."""
PATCH = 2


class Lists(Branches):
    """The pipeline's calls of the transformer: lists of images and captions, the conditional ones first."""

    def unconditional(self, pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bool] | None:
        """The second half of the rows, but of steps that the pipeline does not guide (`cfg_truncation`)."""
        if len(args) < 3:
            return None
        past = _is_past(args[1], getattr(pipeline, "_cfg_truncation", None))
        if past is not None and past[0]:
            return None
        return [row >= len(args[2]) // 2 for row in range(len(args[2]))]

    def same_prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The first half of the captions twice."""
        images, time, captions, *rest = args
        return (images, time, captions[: len(captions) // 2] * 2, *rest), kwargs


class ZImage(FlowPipeline):
    """A frozen ZImagePipeline, the base model or Turbo.

    Args:
        cfg_normalization: The longest that guidance may make a prediction, as a multiple of the conditional
            prediction's norm; 1 is the pipeline's `True`. Null or 0: no limit. The authors advise 1 for realism.
        cfg_truncation: No guidance once 1 − t exceeds this. Null is 1: guidance at every step.
    """

    name = "z_image"
    use = "z_image"
    part = "transformer"
    denoiser_class = "ZImageTransformer2DModel"
    loads = ("ZImagePipeline",)
    wraps = (*loads, "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    called = ("z-image",)
    time_argument = "t"
    interface = ("in_channels", "cap_feat_dim", "all_patch_size", "all_f_patch_size")
    ends_text = False
    masks_text = True
    branches = Lists()
    cfg_normalization: float | None = None
    cfg_truncation: float | None = None

    @takes(Options)
    def __init__(
        self,
        checkpoint: str,
        *,
        cfg_normalization: float | None = None,
        cfg_truncation: float | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("cfg_normalization", cfg_normalization), ("cfg_truncation", cfg_truncation)):
            if value is not None and not value >= 0:
                raise UserError(f"backbone.{name}: got {value}; it must be 0 or more, or null.")
        self.cfg_normalization = cfg_normalization or None
        self.cfg_truncation = cfg_truncation
        super().__init__(checkpoint, **options)

    @classmethod
    def drawing_by_name(cls, checkpoint: str) -> tuple[float, int]:
        """That of Turbo where it is called so."""
        return (1.0, 8) if "turbo" in checkpoint.lower() else (5.0, 50)

    @property
    def drawing(self) -> tuple[float, int]:  # type: ignore[override]
        """As published: 8 steps without guidance for Turbo; 50 steps at the pipeline's guidance 4 for the base."""
        is_turbo = self.pipeline.scheduler.config.get("shift") == TURBO_SHIFT
        return (1.0, 8) if is_turbo else (5.0, 50)

    @property
    def call_options(self) -> dict[str, Any]:
        """The picture's size, and the forms of guidance."""
        forms = {} if self.cfg_normalization is None else {"cfg_normalization": self.cfg_normalization}
        forms |= {} if self.cfg_truncation is None else {"cfg_truncation": self.cfg_truncation}
        return super().call_options | forms

    def guidance_arguments(self, guidance: float, negative_prompts: list[str] | None, count: int) -> dict[str, Any]:
        """The pipeline's guidance g is cond + g · (cond − uncond): one less than here, and 0 is none."""
        return {"guidance_scale": guidance - 1, "negative_prompt": negative_prompts}

    @property
    def combine(self) -> Combine:
        """The pipeline's guidance, in the forms of the options."""
        return partial(_guide, longest=self.cfg_normalization, until=self.cfg_truncation)

    def _patch_size(self) -> int:
        return PATCH

    def _usual_resolution(self, factor: int) -> int:
        return int(self.pipeline.vae.config.sample_size)

    def _text_width(self) -> int:
        config: Any = self.denoiser.config
        return int(config.cap_feat_dim)

    def _schedule(self, num_steps: int) -> dict[str, Any]:
        return {"sigmas": torch.linspace(1.0, 1 / num_steps, num_steps).tolist()}

    def token_places(self, *, layers: int | None, places: Sequence[UNetPlace] | None) -> StreamPlaces:
        """The first blocks that see image and text: each its own tokens behind both, at position (0, 0, 0)."""
        no_unet(places)
        transformer: Any = self.denoiser
        width = transformer.config.dim
        return StreamPlaces(transformer.layers, layers, width=width, stream="x", lengthen=_append, shorten=_drop)

    def encode_text(self, prompts: list[str], *, gradients: bool = False) -> Cond:
        """Qwen3's last hidden states but one [B, S, D] of the prompts as chat messages, float32.

        Equal prompts are encoded once. As in the pipeline, each is padded to 512 tokens for Qwen3, and that padding is
        dropped.
        """
        unique = list(dict.fromkeys(prompts))
        texts = [self._as_chat(prompt) for prompt in unique]
        read = self.pipeline.tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True)
        ids, masks = (torch.tensor(read[name], device=self.device) for name in ("input_ids", "attention_mask"))
        states: list[Tensor] = []
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            for part, seen in zip(ids.split(TEXTS_AT_ONCE), masks.bool().split(TEXTS_AT_ONCE), strict=True):
                result = self.pipeline.text_encoder(
                    input_ids=part,
                    attention_mask=WITHOUT_MASK if seen.is_meta else seen,  # transformers would ask what it holds
                    output_hidden_states=True,
                    use_cache=False,
                )
                states += result.hidden_states[-2].split(1)
        conds = {
            prompt: Cond(at_least_float32(state[:, : sum(seen)]), prompts=(prompt,), combine=self.combine)
            for prompt, state, seen in zip(unique, states, read["attention_mask"], strict=True)
        }
        return Cond.cat([conds[prompt] for prompt in prompts])

    def read_tokens(self, prompts: list[str]) -> list[Tokens]:
        """What is read of each prompt, chat marks included."""
        rows = self.pipeline.tokenizer(
            [self._as_chat(prompt) for prompt in prompts], truncation=True, max_length=TEXT_LENGTH + 1
        )["input_ids"]
        return [Tokens(tuple(row[:TEXT_LENGTH]), len(row) > TEXT_LENGTH) for row in rows]

    def _tokens_read(self, tokenizer: str) -> int:
        return TEXT_LENGTH - len(self.pipeline.tokenizer(self._as_chat("")).input_ids)

    def _as_chat(self, prompt: str) -> str:
        """The prompt as the pipeline's `encode_prompt` has it read."""
        message = {"role": "user", "content": prompt}
        text: str = self.pipeline.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text

    def level_of(self, timestep: Tensor) -> Tensor:
        """The transformer is asked at 1 − t; what float32 made of it is rounded away."""
        return torch.round(1 - timestep, decimals=6)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The transformer's flow [B, C, h, w], in x_t's dtype."""
        dtype = self._dtype
        with self._attention():
            flows = self.denoiser(
                list(x_t.to(dtype).unsqueeze(2).unbind(0)), _reversed(t), _captions(cond, dtype), return_dict=False
            )[0]
        return -torch.stack(flows).squeeze(2).to(x_t.dtype)


def _reversed(t: Tensor) -> Tensor:
    """The transformer's time [B], 1 − t, rounded as the pipeline rounds it."""
    return (1000 - t.float() * 1000) / 1000


def _is_past(time: Tensor, until: float | None) -> Tensor | None:
    """Which rows the pipeline no longer guides at the transformer's time [B], bool [B]; None: it guides at any time."""
    if until is None or until > 1:
        return None
    return time.to(widest_float(time.device)) > until  # the pipeline compares Python's numbers


def _captions(cond: Cond, dtype: torch.dtype) -> list[Tensor]:
    """Each row's text [S_i, D], without the padding at its end; the meta device knows no lengths."""
    embeds = cond.embeds.to(dtype)
    if cond.mask is None or cond.mask.is_meta:
        return list(embeds)
    return [row[:length] for row, length in zip(embeds, cond.mask.sum(dim=1).tolist(), strict=True)]


def _guide(
    uncond: Tensor, cond: Tensor, scale: float, t: Tensor, *, longest: float | None, until: float | None
) -> Tensor:
    """The pipeline's guidance [B, C, h, w]: cond + (scale − 1) · (cond − uncond), in the two optional forms."""
    guided = cond + (scale - 1) * (cond - uncond)
    if longest is not None:
        length, limit = _norms(guided), longest * _norms(cond)
        guided = torch.where(length > limit, guided * (limit / length), guided)
    past = _is_past(_reversed(t), until)
    return guided if past is None else torch.where(past[:, None, None, None], cond, guided)


def _norms(predictions: Tensor) -> Tensor:
    """Each image's [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(predictions, dim=(1, 2, 3), keepdim=True)


def _append(call: BlockCall, rows: Tensor) -> None:
    """The rows behind the sequence: seen by all, and not rotated, which is position (0, 0, 0)."""
    call.set("x", torch.cat([call.get("x"), rows], dim=1))
    mask, rotations = call.get("attn_mask"), call.get("freqs_cis")
    if mask is not None:
        call.set("attn_mask", torch.cat([mask, mask.new_ones(rows.shape[:2])], dim=1))
    unrotated = rotations.new_ones(*rows.shape[:2], rotations.shape[-1])
    call.set("freqs_cis", torch.cat([rotations, unrotated], dim=1))


def _drop(sequence: Tensor, count: int) -> Tensor:
    """A block's result without the last rows."""
    return sequence[:, :-count]
