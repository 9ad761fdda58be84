"""SD3 behind the convention: the flow, its noise level, text from three encoders, and what it refuses."""

from pathlib import Path

import pytest
import torch

from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.backbones.stable_diffusion_3 import StableDiffusion3
from agsm_rl.errors import UserError

PROMPTS = ["a red circle", "", "two blue squares", "a red circle"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_t5", [True, False])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(sd3_backbone: StableDiffusion3, with_t5: bool) -> None:
    if not with_t5:
        sd3_backbone.pipeline.text_encoder_3 = sd3_backbone.pipeline.tokenizer_3 = None
    cond = sd3_backbone.encode_text(PROMPTS)
    embeds, uncond, pooled, uncond_pooled = sd3_backbone.pipeline.encode_prompt(PROMPTS, None, None)
    torch.testing.assert_close(cond.embeds, embeds)
    torch.testing.assert_close(cond.pooled, pooled)
    torch.testing.assert_close(cond.embeds[1], uncond[0])
    torch.testing.assert_close(cond.pooled[1], uncond_pooled[0])
    assert cond.embeds.shape == (4, 20 + 256, 64) and torch.equal(cond.embeds[0], cond.embeds[3])
    assert (cond.embeds[0, 20:].abs().sum() > 0) == with_t5


def test_the_t5_can_be_given_fewer_tokens(tiny_sd3_checkpoint: Path) -> None:
    backbone = load_backbone(str(tiny_sd3_checkpoint), device="cpu", t5_length=12)
    assert backbone.encode_text(["a red circle"]).embeds.shape == (1, 20 + 12, 64)
    assert backbone.call_options == {"height": 16, "width": 16, "max_sequence_length": 12}


@pytest.mark.parametrize("length", [0, 513])
def test_the_t5_s_length_must_be_one_that_the_pipeline_takes(tiny_sd3_checkpoint: Path, length: int) -> None:
    with pytest.raises(UserError, match=f"backbone.t5_length: got {length}; diffusers allows 1 to 512"):
        load_backbone(str(tiny_sd3_checkpoint), device="cpu", t5_length=length)


def test_only_sd3_has_a_t5(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="backbone.t5_length: a StableDiffusionPipeline has no such option"):
        load_backbone(str(tiny_checkpoint), device="cpu", t5_length=12)


def test_the_noise_level_is_the_flow_s_own(sd3_backbone: StableDiffusion3) -> None:
    x0, noise, t = normal(2, 16, 8, 8), normal(2, 16, 8, 8, seed=1), torch.tensor([0.25, 0.9])
    x_t = sd3_backbone.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t[0], 0.75 * x0[0] + 0.25 * noise[0])
    torch.testing.assert_close(x_t[1], 0.1 * x0[1] + 0.9 * noise[1])
    target = sd3_backbone.target(x0, noise, t)
    torch.testing.assert_close(x_t - t[:, None, None, None] * target, x0)
    assert torch.equal(target, noise - x0)


def test_the_transformer_is_asked_at_a_thousand_times_the_level(sd3_backbone: StableDiffusion3) -> None:
    cond, x_t = sd3_backbone.encode_text(["a red circle", "two blue squares"]), normal(2, 16, 8, 8)
    with torch.no_grad():
        together = sd3_backbone.predict(x_t, torch.tensor([0.5, 1.0]), cond)
        for row, timestep in enumerate([500.0, 1000.0]):
            alone = sd3_backbone.denoiser(
                x_t[row : row + 1],
                encoder_hidden_states=cond.embeds[row : row + 1],
                pooled_projections=cond.pooled[row : row + 1],
                timestep=torch.tensor([timestep]),
            ).sample
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_latents_stay_float32_on_a_bfloat16_base(tiny_sd3_checkpoint: Path) -> None:
    backbone = StableDiffusion3(str(tiny_sd3_checkpoint), dtype="bfloat16", device="cpu")
    x_t = normal(1, 16, 8, 8)
    with torch.no_grad():
        prediction = backbone.predict(x_t, torch.tensor([0.5]), backbone.encode_text([""]))
    assert backbone.pipeline.transformer.dtype == torch.bfloat16
    assert prediction.dtype == backbone.decode(x_t).dtype == torch.float32


def test_the_resolution_must_fit_the_patches(tiny_sd3_checkpoint: Path) -> None:
    assert StableDiffusion3(str(tiny_sd3_checkpoint), resolution=32, device="cpu").latent_shape == (16, 16, 16)
    with pytest.raises(UserError, match="resolution: got 18; a positive multiple of 4 is needed"):
        StableDiffusion3(str(tiny_sd3_checkpoint), resolution=18, device="cpu")
    with pytest.raises(
        UserError, match="resolution: got 128; a positive multiple of 4 is needed for each side, at most 64"
    ):
        StableDiffusion3(str(tiny_sd3_checkpoint), resolution=128, device="cpu")


def test_the_wrong_use_says_the_right_one(tiny_checkpoint: Path, tiny_sd3_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"is a StableDiffusion3Pipeline.*`use: stable_diffusion_3`"):
        StableDiffusion(str(tiny_sd3_checkpoint))
    with pytest.raises(UserError, match=r"is a StableDiffusionPipeline.*`use: stable_diffusion`"):
        StableDiffusion3(str(tiny_checkpoint))
    assert isinstance(load_backbone(str(tiny_sd3_checkpoint), device="cpu"), StableDiffusion3)
