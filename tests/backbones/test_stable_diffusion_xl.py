"""SDXL's own ways: two CLIPs side by side, the pooled embedding, time ids, a VAE that float16 is too small for."""

from pathlib import Path

import torch

from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.interfaces import Cond, PairBatch
from agsm_rl.objectives.grid import Grid, group_columns
from agsm_rl.training.sampling import guided

PROMPTS = ["a red circle", "two blue squares", "a red circle"]


def test_prompts_are_encoded_as_the_pipeline_encodes_them(xl_backbone: StableDiffusion) -> None:
    cond = xl_backbone.encode_text(PROMPTS)
    embeds, _, pooled, _ = xl_backbone.pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(cond.embeds, embeds)
    torch.testing.assert_close(cond.pooled, pooled)
    assert torch.equal(cond.embeds[0], cond.embeds[2])
    both = xl_backbone.pipeline.text_encoder, xl_backbone.pipeline.text_encoder_2
    assert cond.embeds.shape[-1] == sum(encoder.config.hidden_size for encoder in both)


def test_the_unconditional_prompt_is_the_pipeline_s(xl_backbone: StableDiffusion) -> None:
    cond = xl_backbone.encode_text(["a red circle", ""])
    _, embeds, _, pooled = xl_backbone.pipeline.encode_prompt("a red circle", do_classifier_free_guidance=True)
    assert torch.equal(cond.embeds[1:], embeds) and torch.equal(cond.pooled[1:], pooled)
    assert cond.embeds[1].abs().sum() == 0 != cond.embeds[0].abs().sum()
    xl_backbone.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    cond = xl_backbone.encode_text([""])
    _, embeds, _, pooled = xl_backbone.pipeline.encode_prompt("a red circle", do_classifier_free_guidance=True)
    torch.testing.assert_close(cond.embeds, embeds)
    torch.testing.assert_close(cond.pooled, pooled)
    assert embeds.abs().sum() > 0


def test_the_denoiser_is_told_the_size_and_the_pooled_text(xl_backbone: StableDiffusion) -> None:
    seen = {}
    xl_backbone.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    cond = xl_backbone.encode_text(PROMPTS)
    with torch.no_grad():
        xl_backbone.predict(torch.zeros(3, 4, 8, 8), torch.full((3,), 0.5), cond)
        ours = dict(seen)
        xl_backbone.pipeline(PROMPTS, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert ours["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    assert torch.equal(ours["time_ids"], seen["time_ids"]) and ours["time_ids"].dtype == seen["time_ids"].dtype
    torch.testing.assert_close(ours["text_embeds"], seen["text_embeds"])


def test_the_denoiser_is_told_how_each_picture_was_cut(xl_backbone: StableDiffusion) -> None:
    seen = []
    xl_backbone.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    crops = torch.tensor([[900.0, 1600.0, 0.0, 40.0], [512.0, 512.0, 8.0, 0.0]])
    batch = PairBatch(PROMPTS[:2], torch.arange(2), torch.zeros(2, 4, 8, 12), crops=crops)
    with torch.no_grad():
        cond, uncond = batch.encode_text(xl_backbone), xl_backbone.encode_text([""])
        guided(xl_backbone.predict, batch.latents, torch.full((2,), 0.5), cond, uncond, 3.0)
    told = [[*crop, 16, 24] for crop in crops.tolist()]
    assert seen[0].tolist() == told * 2  # both branches of guidance are of one picture


def test_a_picture_under_others_prompts_keeps_its_crop() -> None:
    crops, seen = torch.arange(8.0).reshape(2, 4), []
    columns, own = group_columns(2, 2)
    grid = Grid(
        x_t=torch.zeros(2, 4, 2, 2),
        t=torch.zeros(2),
        target=torch.zeros(2, 4, 2, 2),
        cond=Cond(torch.zeros(2, 3, 5), prompts=("a", "b"), crops=crops),
        images=torch.arange(2),
        columns=columns,
        own=own,
        is_own=(True, False, False, True),
        negatives=None,
    )
    grid.predict(lambda x_t, t, cond, bank: seen.append(cond) or x_t)
    assert seen[0].prompts == ("a", "b", "a", "b")
    assert torch.equal(seen[0].crops, crops.repeat_interleave(2, dim=0))


def test_a_vae_that_overflows_in_float16_works_in_float32(tiny_xl_checkpoint: Path) -> None:
    backbone = StableDiffusion(str(tiny_xl_checkpoint), dtype="float16", device="cpu")
    exact = StableDiffusion(str(tiny_xl_checkpoint), device="cpu")
    assert backbone.pipeline.vae.dtype == torch.float16
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = backbone.decode(latents)
    torch.testing.assert_close(images, exact.decode(latents), rtol=0, atol=2e-3)
    assert torch.autograd.grad(images.sum(), latents)[0].isfinite().all()
    assert torch.isfinite(backbone.encode_images(images.detach())).all()
