"""What holds for SD1.5, SDXL and SD3 alike, through the convention alone."""

import shutil
from pathlib import Path

import pytest
import torch

from agsm_rl.backbones import frozen_pipeline, load_backbone
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw
from agsm_rl.interfaces import Backbone
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.policy import Policy
from agsm_rl.training.sampling import guided

PROMPTS = ["a red circle", "two blue squares"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_frozen_backbone(each_backbone: Backbone) -> None:
    assert isinstance(each_backbone, Backbone)
    assert each_backbone.resolution == 16 and each_backbone.latent_shape[1:] == (8, 8)
    for module in each_backbone.pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            assert not module.training
            assert not any(parameter.requires_grad for parameter in module.parameters())


def test_images_in_latents_are_scaled_and_shifted_as_the_vae_says(each_backbone: Backbone) -> None:
    images, vae = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), each_backbone.pipeline.vae
    shift, scale = vae.config.shift_factor or 0, vae.config.scaling_factor
    latents = each_backbone.encode_images(images)
    with torch.no_grad():
        expected = (vae.encode(images * 2 - 1).latent_dist.mean - shift) * scale
        decoded = vae.decode(latents / scale + shift).sample
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(each_backbone.decode(latents), (decoded / 2 + 0.5).clamp(0, 1))


def test_large_images_are_encoded_a_few_at_a_time(each_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together, sizes = each_backbone.encode_images(images), []
    encode = each_backbone.pipeline.vae.encode
    monkeypatch.setattr(each_backbone.pipeline.vae, "encode", lambda part: sizes.append(len(part)) or encode(part))
    monkeypatch.setattr(frozen_pipeline, "PIXELS_AT_ONCE", 2 * 16 * 16)
    torch.testing.assert_close(each_backbone.encode_images(images), together)
    assert sizes == [2, 2, 1]


@torch.no_grad()
def test_its_parts_together_draw_the_pipeline_s_picture(each_backbone: Backbone) -> None:
    """encode_text, guided predictions, the sampler's steps without noise, decode: nothing of it may differ."""
    drawn = draw(each_backbone, PROMPTS, [3, 4], guidance=3.0, num_steps=4)
    x_t = torch.cat([normal(1, *each_backbone.latent_shape, seed=seed) for seed in (3, 4)])
    cond, uncond = each_backbone.encode_text(PROMPTS), each_backbone.encode_text([""])
    sampler = each_backbone.sampler(4)
    for k in range(4):
        prediction = guided(each_backbone.predict, x_t, sampler.t[k].expand(2), cond, uncond, 3.0)
        x_t, std = sampler.transition(k, x_t, prediction, eta=0.0)
        assert std == 0
    torch.testing.assert_close(each_backbone.decode(x_t), drawn, rtol=1e-4, atol=1e-5)


def test_fresh_rollouts_have_ratio_one(each_backbone: Backbone, make_adapters, make_rollouts) -> None:
    policy = Policy(each_backbone, make_adapters())
    for guidance in (1.0, 3.0):
        _, metrics = DDPO().loss(policy, make_rollouts(bind=True, guidance=guidance).next(policy))
        assert metrics["ratio_deviation"].item() < 1e-5


def test_in_bfloat16_too_rollouts_have_ratio_one_and_gradients_lead_the_same_way(
    each_checkpoint: Path, make_adapters, make_rollouts
) -> None:
    gradients = []
    for dtype, checkpointing in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        backbone = load_backbone(str(each_checkpoint), device="cpu", dtype=dtype, gradient_checkpointing=checkpointing)
        policy = Policy(backbone, make_adapters())
        loss, metrics = DDPO().loss(policy, make_rollouts(bind=True, guidance=1.0).next(policy))
        assert metrics["ratio_deviation"].item() < 1e-5
        x_t, cond = normal(2, *backbone.latent_shape), backbone.encode_text(PROMPTS)
        error = (policy.live(x_t, torch.tensor([0.3, 0.7]), cond) - 1).square().mean()
        found = torch.autograd.grad(
            error, list(policy.parameters().values()), allow_unused=True, materialize_grads=True
        )
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    exact, half, checkpointed = gradients
    assert torch.cosine_similarity(half, exact, dim=0) > 0.98
    assert torch.cosine_similarity(half, checkpointed, dim=0) > 0.9999


def test_latents_of_a_rollout_lead_back_to_its_noise(each_backbone: Backbone) -> None:
    """Adding noise and stepping with the exact prediction returns the image: predictions, levels and steps agree."""
    x0, noise = normal(1, *each_backbone.latent_shape), normal(1, *each_backbone.latent_shape, seed=1)
    sampler = each_backbone.sampler(5)
    for k in range(4):
        now, later = sampler.t[k : k + 1], sampler.t[k + 1 : k + 2]
        x_t, target = each_backbone.add_noise(x0, noise, now), each_backbone.target(x0, noise, now)
        mean, _ = sampler.transition(k, x_t, target, eta=0.0)
        torch.testing.assert_close(mean, each_backbone.add_noise(x0, noise, later), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny_checkpoint", "tiny_xl_checkpoint"])
def test_channels_last_changes_nothing_but_rounding(kind: str, request: pytest.FixtureRequest) -> None:
    where = str(request.getfixturevalue(kind))
    plain = load_backbone(where, device="cpu")
    laid_out = load_backbone(where, device="cpu", memory_format="channels_last")
    for model in (laid_out.denoiser, laid_out.pipeline.vae):
        kernels = [one.weight for one in model.modules() if isinstance(one, torch.nn.Conv2d)]
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in kernels)
    images, x_t, t = torch.rand(2, 3, 16, 16), normal(2, *plain.latent_shape), torch.tensor([0.2, 0.7])
    cond = plain.encode_text(PROMPTS)
    for one, other in (
        (plain.encode_images(images), laid_out.encode_images(images)),
        (plain.predict(x_t, t, cond), laid_out.predict(x_t, t, cond)),
        (plain.decode(x_t), laid_out.decode(x_t)),
        (
            draw(plain, PROMPTS, [3, 4], guidance=3.0, num_steps=3),
            draw(laid_out, PROMPTS, [3, 4], guidance=3.0, num_steps=3),
        ),
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert plain.identity("images") == laid_out.identity("images")


def test_channels_last_is_refused_for_a_transformer_and_as_another_word(
    tiny_checkpoint: Path, tiny_sd3_checkpoint: Path
) -> None:
    with pytest.raises(UserError, match=r"backbone\.memory_format: .*only a U-Net is made of convolutions"):
        load_backbone(str(tiny_sd3_checkpoint), device="cpu", memory_format="channels_last")
    with pytest.raises(UserError, match=r"backbone\.memory_format: got 'nhwc'; allowed: channels_last"):
        load_backbone(str(tiny_checkpoint), device="cpu", memory_format="nhwc")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_denoiser_learns_the_same(tiny_checkpoint: Path) -> None:
    found = []
    for mode in (None, "default"):
        backbone = load_backbone(str(tiny_checkpoint), device="cpu", compile=mode)
        assert (backbone.denoiser._compiled_call_impl is None) == (mode is None)
        x_t, cond = normal(2, *backbone.latent_shape).requires_grad_(True), backbone.encode_text(PROMPTS)
        prediction = backbone.predict(x_t, torch.tensor([0.2, 0.7]), cond)
        found.append((prediction.detach(), *torch.autograd.grad(prediction.square().mean(), x_t)))
    torch.compiler.reset()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_where_nothing_can_be_compiled_a_warning_says_so_and_all_works_as_ever(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", refuse)
    backbone = load_backbone(str(tiny_checkpoint), device="cpu", compile="default")
    assert "backbone.compile: left out, nothing can be compiled here: no C++ compiler" in caplog.text
    assert "trace" not in caplog.text and backbone.denoiser._compiled_call_impl is None
    with pytest.raises(UserError, match=r"backbone\.compile: .*fastest"):
        load_backbone(str(tiny_checkpoint), device="cpu", compile="fastest")


def test_compile_and_gradient_checkpointing_are_refused_together(tiny_checkpoint: Path) -> None:
    with pytest.raises(
        UserError, match=r"backbone\.compile: .*`compile: regional`.*leave out compile or checkpointing"
    ):
        load_backbone(str(tiny_checkpoint), device="cpu", compile="default", gradient_checkpointing=True)
