"""The Stable Diffusion backbone: its convention, its sampler, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from agsm_rl.backbones import backbone_of, load_backbone
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone


def alphas(backbone: StableDiffusion) -> torch.Tensor:
    """ᾱ of SD1.5's schedule, from its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def with_scheduler(backbone: StableDiffusion, **changes: object) -> StableDiffusion:
    config = {**backbone.pipeline.scheduler.config, **changes}
    backbone.pipeline.scheduler = DDIMScheduler.from_config(config)
    return StableDiffusion.from_pipeline(backbone.pipeline)


def test_it_is_a_frozen_backbone(backbone: StableDiffusion) -> None:
    assert isinstance(backbone, Backbone)
    assert backbone.resolution == 16 and backbone.latent_shape == (4, 8, 8)
    for module in (backbone.pipeline.unet, backbone.pipeline.vae, backbone.pipeline.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_every_timestep_comes_back_from_its_noise_level(backbone: StableDiffusion) -> None:
    timesteps = torch.arange(1000)
    assert torch.equal(backbone.timesteps((timesteps + 0.5) / 1000), timesteps)
    assert torch.equal(backbone.timesteps(timesteps / 1000), timesteps)
    assert torch.equal(backbone.timesteps((timesteps + 0.99) / 1000), timesteps)


@pytest.mark.parametrize("num_steps", [1, 7, 30, 50, 1000])
def test_a_samplers_noise_levels_are_its_timesteps(backbone: StableDiffusion, num_steps: int) -> None:
    plain = DDIMScheduler.from_config({**backbone.pipeline.scheduler.config, "steps_offset": 0})
    backbone.pipeline.scheduler = plain
    plain.set_timesteps(num_steps)
    assert torch.equal(backbone.timesteps(backbone.sampler(num_steps).t), plain.timesteps)


def test_equal_prompts_have_equal_rows_in_the_prompts_order(backbone: StableDiffusion) -> None:
    prompts = ["a red circle", "", "two blue squares", "a red circle"]
    cond = backbone.encode_text(prompts)
    expected, _ = backbone.pipeline.encode_prompt(prompts, backbone.device, 1, False)
    torch.testing.assert_close(cond.embeds, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(cond.embeds[0], cond.embeds[3])


def test_images_in_latents_are_scaled_as_the_pipeline_scales_them(backbone: StableDiffusion) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_images(images)
    vae = backbone.pipeline.vae
    with torch.no_grad():
        torch.testing.assert_close(latents, vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor)
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(backbone.decode(latents), (decoded / 2 + 0.5).clamp(0, 1))


def test_decoding_is_differentiable(backbone: StableDiffusion) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = backbone.decode(latents)
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert gradient.abs().sum() > 0 and images.min() >= 0 and images.max() <= 1


def test_noise_is_added_and_predicted_per_row(backbone: StableDiffusion) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    t = torch.tensor([0.1005, 0.9])
    a = alphas(backbone)[[100, 900]].float()[:, None, None, None]
    x_t = backbone.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, a.sqrt() * x0 + (1 - a).sqrt() * noise)
    assert backbone.target(x0, noise, t) is noise
    cond = backbone.encode_text(["a red circle", "a blue square"])
    with torch.no_grad():
        together = backbone.predict(x_t, t, cond)
        for row, timestep in enumerate([100, 900]):
            alone = backbone.denoiser(x_t[row : row + 1], timestep, cond.embeds[row : row + 1]).sample
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_predicts_v_is_trained_on_v(backbone: StableDiffusion) -> None:
    backbone = with_scheduler(backbone, prediction_type="v_prediction")
    x0, noise, t = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0), torch.tensor([0.5])
    a = alphas(backbone)[500].float()
    torch.testing.assert_close(backbone.target(x0, noise, t), a.sqrt() * noise - (1 - a).sqrt() * x0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [0, 4, 9])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_transition_is_the_closed_form_of_ddim(
    backbone: StableDiffusion, k: int, eta: float, prediction_type: str
) -> None:
    backbone = with_scheduler(backbone, prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(k)
    x_t, output = (4 * torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mean, std = backbone.sampler(10).transition(k, x_t, output, eta=eta)
    timestep = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1][k]
    a = alphas(backbone)[timestep]
    previous = alphas(backbone)[max(timestep - 100, 0)]  # the last step ends at timestep 0, not at a clean image
    sigma = eta * ((1 - previous) / (1 - a) * (1 - a / previous)).sqrt()
    noise = output if prediction_type == "epsilon" else a.sqrt() * output + (1 - a).sqrt() * x_t
    x0 = (x_t - (1 - a).sqrt() * noise) / a.sqrt()
    expected = previous.sqrt() * x0 + (1 - previous - sigma**2).sqrt() * noise
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)  # diffusers keeps ᾱ in float32
    assert std.ndim == 0
    torch.testing.assert_close(std, sigma, rtol=1e-3, atol=1e-6)
    assert (std == 0) == (eta == 0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_from_zero_terminal_snr_are_finite_and_exact(backbone: StableDiffusion, eta: float) -> None:
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    backbone = with_scheduler(backbone, **options)
    generator = torch.Generator().manual_seed(0)
    x_t, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for num_steps in range(10, 51):
        sampler = backbone.sampler(num_steps)
        assert sampler.timesteps[0] == 999  # pure noise
        for k in range(num_steps):
            mean, std = sampler.transition(k, x_t, output, eta=eta)
            assert torch.isfinite(mean).all() and torch.isfinite(std)
        # From pure noise v is −x0 and the noise is x_t itself, of which η = 1 keeps nothing.
        mean, std = sampler.transition(0, x_t, output, eta=eta)
        previous = sampler.scheduler.alphas_cumprod[999 - 1000 // num_steps].double()
        sigma = eta * (1 - previous).sqrt()
        kept = ((1 - previous - sigma**2).clamp(min=0)).sqrt()
        torch.testing.assert_close(std.double(), sigma, rtol=1e-6, atol=0)
        # float32: the root of a rounding error of 1e-7 is 3e-4, times x_t.
        torch.testing.assert_close(mean, (-previous.sqrt() * output + kept * x_t).float(), rtol=1e-4, atol=2e-3)


def test_a_drawn_step_is_what_the_scheduler_itself_draws(backbone: StableDiffusion) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, output, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    sampler = backbone.sampler(10)
    scheduler = backbone.pipeline.scheduler
    scheduler.set_timesteps(10)
    for k, timestep in enumerate(scheduler.timesteps):
        mean, std = sampler.transition(k, x_t, output, eta=1.0)
        drawn = scheduler.step(output, timestep, x_t, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + std * noise, drawn, rtol=1e-5, atol=1e-6)


def test_a_pipeline_with_another_scheduler_gets_ddim_for_latents(backbone: StableDiffusion) -> None:
    expected = backbone.sampler(10)
    kept = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    backbone.pipeline.scheduler = PNDMScheduler(**kept, skip_prk_steps=True)
    sampler = StableDiffusion.from_pipeline(backbone.pipeline).sampler(10)
    x_t = torch.full((1, 4, 8, 8), 5.0)  # clipping to [-1, 1] would show
    assert torch.equal(sampler.t, expected.t)
    for k in range(10):
        assert torch.equal(
            torch.stack([x.mean() for x in sampler.transition(k, x_t, x_t, eta=1.0)]),
            torch.stack([x.mean() for x in expected.transition(k, x_t, x_t, eta=1.0)]),
        )


def test_latents_stay_float32_on_a_bfloat16_base(tiny_checkpoint: Path) -> None:
    backbone = StableDiffusion(str(tiny_checkpoint), dtype="bfloat16", device="cpu")
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction = backbone.predict(x_t, torch.tensor([0.5]), backbone.encode_text([""]))
    assert backbone.pipeline.unet.dtype == torch.bfloat16
    assert prediction.dtype == backbone.decode(x_t).dtype == torch.float32


def test_another_resolution_changes_the_latents_size(tiny_checkpoint: Path) -> None:
    assert StableDiffusion(str(tiny_checkpoint), resolution=32, device="cpu").latent_shape == (4, 16, 16)
    with pytest.raises(UserError, match="resolution: got 17; a positive multiple of 8 is needed"):
        StableDiffusion(str(tiny_checkpoint), resolution=17, device="cpu")


def test_a_missing_folder_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        StableDiffusion(str(tmp_path / "nowhere"), local_files_only=True)
    with pytest.raises(UserError, match=r"model_index\.json"):
        StableDiffusion(str(tmp_path))
    with pytest.raises(UserError, match="builtin:shapes-sd51"):
        StableDiffusion("builtin:shapes-sd51")


def test_a_truncated_checkpoint_is_the_users_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        StableDiffusion(str(folder), device="cpu")


def test_an_unsupported_pipeline_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_checkpoint / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "AuraFlowPipeline"}))
    with pytest.raises(
        UserError, match="AuraFlowPipeline; supported: StableDiffusionPipeline, StableDiffusionXLPipeline"
    ):
        StableDiffusion(str(tmp_path))
    with pytest.raises(UserError, match="is a dict; supported"):
        backbone_of({})


def test_pictures_are_drawn_by_ddim_where_it_is_asked_for(tiny_checkpoint: Path, tiny_sd3_checkpoint: Path) -> None:
    own = StableDiffusion(str(tiny_checkpoint), device="cpu")
    own.pipeline.scheduler = PNDMScheduler.from_config(own.pipeline.scheduler.config)
    own._draw_by("ddim")
    assert isinstance(own.pipeline.scheduler, DDIMScheduler) and not own.pipeline.scheduler.config.clip_sample
    asked = StableDiffusion(str(tiny_checkpoint), device="cpu", scheduler="ddim")
    assert torch.equal(asked.pipeline.scheduler.alphas_cumprod, own.pipeline.scheduler.alphas_cumprod)
    with pytest.raises(UserError, match="drawn by the checkpoint's own scheduler alone; leave it out"):
        load_backbone(str(tiny_sd3_checkpoint), device="cpu", scheduler="ddim")
