"""The layouts of an embedded base: which parts each pipeline has, and how they are put together.

All read captions of TEXT_LENGTH tokens and draw 8 x 8 latents. A part that two layouts have is trained once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from agsm_rl.shapes.train_base.autoencoder import DOWNSAMPLING, rescale
from agsm_rl.shapes.train_base.text import (
    SHARED,
    T5_WIDTH,
    TEXT_LENGTH,
    TEXT_WIDTH,
    LastStates,
    PenultimateStates,
    Reader,
    T5States,
    make_t5_tokenizer,
    make_tokenizer,
    without_projection,
)
from agsm_rl.shapes.worlds import SCENES, SHAPES, World
from agsm_rl.training.precision import is_slow

# The squared noise error is weighted by 1 / alpha_bar up to this, as v-prediction weights it: composition is settled at
# high noise, where the plain error hardly counts.
LARGEST_WEIGHT = 50.0
FLOW_SHIFT = 3.0
"""SD3's: noise levels are drawn, in training and in sampling, nearer to pure noise, where composition is settled."""
LONG_TEXT_EVERY = 10
"""SD3 reads 256 tokens of T5 by default, nearly all of them padding, which makes a step four times as slow."""


@dataclass(frozen=True)
class Layout:
    """How one kind of base is made."""

    readers: Mapping[str, type[Reader]]
    """The text encoders by the names of their stages."""
    assemble: Callable[..., Any]
    """(vae, text encoders in the order of `readers`, world=…) → the pipeline, with a denoiser of random weights."""
    noise_levels: Callable[[Tensor], Tensor]
    """Uniform numbers in [0, 1) → the noise levels t to train at."""
    weight: Callable[[Tensor], Tensor]
    """The share of the image in x_t, √ᾱ or 1 − σ → the weight of the squared error of the prediction."""
    learning_rate: float = 6e-4
    muon_rate: float | None = None
    """Muon's learning rate for the transformer blocks' matrices; None: AdamW trains them too."""
    stored: torch.dtype = torch.float32
    """Of the denoiser's file; a pipeline is float32 again when it is loaded. A base must not exceed 25 MB."""
    precision: Callable[[], AbstractContextManager[None]] = nullcontext
    """The context of the predictions in training."""
    channels_last: bool = False
    """Whether the denoiser's convolutions are laid out for bfloat16, which takes a third off a U-Net's step."""
    told_what_is_drawn: bool = False
    """Whether a transformer's middle block is told what is drawn where (representation.py)."""
    prepare: Callable[[Any, int, int], int] = lambda backbone, step, batch_size: batch_size
    """What is set on the backbone before each step, given its usual batch size; returns the step's."""


def make_unet(**options: Any) -> UNet2DConditionModel:
    """Two levels with two transformer layers a block where soft tokens are seen (down, mid), one in the up blocks."""
    return UNet2DConditionModel(
        sample_size=SHAPES.look.image_size // DOWNSAMPLING,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        transformer_layers_per_block=[2, 2],
        reverse_transformer_layers_per_block=[1, 1],
        attention_head_dim=(4, 4),
        norm_num_groups=16,
        **options,
    )


def make_scheduler() -> DDIMScheduler:
    """DDPM's noise schedule, which ends in pure noise (alpha_bar 4e-5).

    Stable Diffusion 1.5's ends at alpha_bar 5e-3, where 8 x 8 latents still show colours and places: a model trained on
    it looks there for the composition rather than into the prompt.
    """
    return DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble_sd15(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    *,
    unet: UNet2DConditionModel | None = None,
    tokenizer: CLIPTokenizer | None = None,
    world: World = SHAPES,
) -> StableDiffusionPipeline:
    """SD1.5's layout, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer or make_tokenizer(world),
        unet=unet or make_unet(cross_attention_dim=TEXT_WIDTH),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def assemble_sdxl(vae: AutoencoderKL, first: Any, second: Any, *, world: World = SHAPES) -> StableDiffusionXLPipeline:
    """SDXL's layout with its VAE's scaling factor; the second encoder's pooled embedding and time ids go in too."""
    rescale(vae, scaling_factor=0.13025)
    ids = 16
    unet = make_unet(
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=ids,
        projection_class_embeddings_input_dim=6 * ids + SHARED,
    )
    tokenizer = make_tokenizer(world)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first if isinstance(first, CLIPTextModel) else without_projection(first),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def assemble_sd3(
    vae: AutoencoderKL, first: Any, second: Any, t5: Any, *, world: World = SHAPES
) -> StableDiffusion3Pipeline:
    """SD3's layout with its VAE's scaling and shift factors: six joint blocks, 128 wide, a token for each latent."""
    rescale(vae, scaling_factor=1.5305, shift_factor=0.0609)
    transformer = SD3Transformer2DModel(
        sample_size=SHAPES.look.image_size // DOWNSAMPLING,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * SHARED,
        pos_embed_max_size=16,
    )
    _begin_as_identity(transformer)
    tokenizer = make_tokenizer(world)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=make_t5_tokenizer(world),
    )


@torch.no_grad()
def _begin_as_identity(transformer: SD3Transformer2DModel) -> None:
    """Zero gates and a zero last layer, as diffusion transformers begin (arXiv 2212.09748, adaLN-Zero)."""
    last = [transformer.norm_out.linear, transformer.proj_out]
    gates = [norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*last, *gates):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _as_v_prediction(signal: Tensor) -> Tensor:
    return (1 / signal.square()).clamp(max=LARGEST_WEIGHT)


def _shifted(uniform: Tensor) -> Tensor:
    return FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)


def _mostly_between(uniform: Tensor) -> Tensor:
    """A quarter as SD3 samples; the rest logit-normal, mostly between 0.18 and 0.57, where shapes are settled.

    Where the objects go, at nearly pure noise, a transformer learns in a few thousand steps; to draw a clean shape
    wherever it goes takes most of the training (docs/scenes.md).
    """
    rest = ((uniform - 0.25) / 0.75).clamp(min=1e-4)
    return torch.where(uniform < 0.25, _shifted(uniform / 0.25), torch.sigmoid(0.9 * torch.special.ndtri(rest) - 0.6))


@contextmanager
def _matrix_products_in_bfloat16() -> Iterator[None]:
    """Five times as fast for a transformer's products on a CPU that has them; float32 on one that has not."""
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_slow(torch.bfloat16, torch.device("cpu"))):
        yield


def _alternate_text_length(backbone: Any, step: int, batch_size: int) -> int:
    """Mostly as many T5 tokens as captions have; at times as many as the pipeline pads to when it is told nothing."""
    backbone.t5_length = type(backbone).t5_length if step % LONG_TEXT_EVERY == 0 else TEXT_LENGTH
    return batch_size


def _alternate_text_length_of_scenes(backbone: Any, step: int, batch_size: int) -> int:
    """As above, but long texts come half as often, with a sixth of the images: a step with them takes no longer."""
    long = step % (2 * LONG_TEXT_EVERY) == 0
    backbone.t5_length = type(backbone).t5_length if long else SCENES.text_length
    return max(1, batch_size // 6) if long else batch_size


TWO_CLIPS = {"clip_1": PenultimateStates, "clip_2": PenultimateStates}
LAYOUTS = {
    "sd15": Layout({"text": LastStates}, assemble_sd15, lambda uniform: uniform, _as_v_prediction),
    "sdxl": Layout(TWO_CLIPS, assemble_sdxl, lambda uniform: uniform, _as_v_prediction, stored=torch.float16),
    "sd3": Layout(
        {**TWO_CLIPS, "t5": T5States},
        assemble_sd3,
        _shifted,
        torch.ones_like,
        learning_rate=1e-3,
        precision=_matrix_products_in_bfloat16,
        prepare=_alternate_text_length,
    ),
}


LAYOUTS_OF_SCENES = {
    "sd15": replace(LAYOUTS["sd15"], precision=_matrix_products_in_bfloat16, channels_last=True, stored=torch.float16),
    "sd3": replace(
        LAYOUTS["sd3"],
        noise_levels=_mostly_between,
        told_what_is_drawn=True,
        prepare=_alternate_text_length_of_scenes,
        muon_rate=4e-3,
        stored=torch.float16,
    ),
}


def layouts_of(world: World) -> Mapping[str, Layout]:
    """The layouts of a world's bases."""
    return LAYOUTS_OF_SCENES if world is SCENES else LAYOUTS


def make_text_tokenizer(reader: type[Reader], world: World = SHAPES) -> Any:
    """The tokenizer that an encoder of this kind reads with."""
    return make_t5_tokenizer(world) if reader is T5States else make_tokenizer(world)
