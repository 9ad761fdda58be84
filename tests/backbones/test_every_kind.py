"""The contract of every newer kind of backbone (tests/tiny): what a kind declares is all that the rest needs.

Each kind's tiny pipeline is loaded once; a test leaves it as it found it.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from test_matrix import OBJECTIVES, OPTIONS, SOURCE_OF, SOURCES
from tiny import KINDS, options_of, save_kind, tiny
from torch import Tensor

from agsm_rl import registry
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import backbone_of, load_backbone
from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.backbones.text_cache import up_to_drawing
from agsm_rl.evaluate.drawing import draw
from agsm_rl.export.attach import attach, save_adapters
from agsm_rl.interfaces import Backbone
from agsm_rl.policy import Policy
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.training.sampling import guided
from agsm_rl.training.sizes import drawing_at, sampler_for

PROMPTS = ["a red circle", "two blue squares beside a dark green star"]
SEEDS = [3, 4]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kind(kind, tmp_path_factory.mktemp(f"tiny-{kind}"))


@pytest.fixture(scope="module")
def base(kind: str, folder: Path) -> Backbone:
    """Its backbone, with nothing attached."""
    return load_backbone(str(folder), **options_of(kind))


@pytest.fixture
def policy(base: Backbone) -> Iterator[Policy]:
    """Two banks of soft tokens and a LoRA on it, moved away from where they begin."""
    made = Policy(base, {"tokens": SoftTokens(num_tokens=2), "lora": LoRA(rank=2)})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in made.parameters().values():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    yield made
    for adapter in reversed(made.adapters.values()):
        adapter.detach()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(options: dict[str, Any]) -> dict[str, int]:
    """Two prompts, and two images of each, in place of four."""
    return {name: 2 for name in ("num_prompts", "images_per_prompt") if name in options}


def plain(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: Any, base: Backbone, guidance: float = 3.0) -> Tensor:
    """What a pipeline draws by itself; some write into the list of prompts that they are given."""
    seeds = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = base.guidance_arguments(guidance, None, len(PROMPTS)) | base.call_options
    return pipeline(prompt=list(PROMPTS), generator=seeds, num_inference_steps=3, output_type="pt", **options).images


def drawn(base: Backbone, guidance: float = 3.0) -> Tensor:
    return draw(base, PROMPTS, SEEDS, guidance=guidance, num_steps=3)


def predicted(policy: Policy) -> Tensor:
    base, t = policy.backbone, torch.tensor([0.2, 0.7])
    return policy.live(normal(2, *base.latent_shape), t, base.encode_text(PROMPTS), bank=("positive", "negative"))


def test_auto_finds_it_and_freezes_it(kind: str, base: Backbone) -> None:
    assert isinstance(base, Backbone)
    assert type(base) is registry.load("backbones", kind, where=kind) and base.use == kind
    modules = [part for part in base.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(part.training for part in modules)
    assert not any(parameter.requires_grad for part in modules for parameter in part.parameters())


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_its_parts_together_draw_the_plain_pipeline_s_picture(folder: Path, base: Backbone, guidance: float) -> None:
    expected = drawn_by(plain(folder), base, guidance)
    assert expected.std() > 0.01 and expected.shape[2:] == (base.resolution, base.resolution)
    assert torch.equal(drawn(base, guidance), expected)
    x_t = torch.cat([normal(1, *base.latent_shape, seed=seed) for seed in SEEDS])
    cond, uncond = base.encode_text(PROMPTS), base.encode_text([""])
    sampler = base.sampler(3)
    for k, t in enumerate(sampler.t):
        prediction = guided(base.predict, x_t, t.expand(2), cond, uncond, guidance)
        x_t, std = sampler.transition(k, x_t, prediction, eta=0.0)
        assert std == 0
    torch.testing.assert_close(base.decode(x_t), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_draws_a_wide_picture_as_the_plain_pipeline_does(folder: Path, base: Backbone) -> None:
    before, step = (base.resolution, base.latent_shape), base.resolution_step
    with drawing_at(base, (step, 2 * step)):
        expected = drawn_by(plain(folder), base)
        assert expected.shape[2:] == (step, 2 * step)
        x_t = torch.cat([normal(1, *base.latent_shape, seed=seed) for seed in SEEDS])
    assert (base.resolution, base.latent_shape) == before
    assert base.encode_images(expected).shape == x_t.shape
    cond, uncond, sampler = base.encode_text(PROMPTS), base.encode_text([""]), sampler_for(base, 3, x_t)
    for k, t in enumerate(sampler.t):
        prediction = guided(base.predict, x_t, t.expand(2), cond, uncond, 3.0)
        x_t, _ = sampler.transition(k, x_t, prediction, eta=0.0)
    torch.testing.assert_close(base.decode(x_t), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_reads_and_draws_the_same_without_its_text_encoders(
    kind: str, folder: Path, base: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path))
    kept = load_backbone(str(folder), **options_of(kind), text={"keep": "cache"}, vae_slicing=True, vae_tiling=True)
    kept.text_cache.fill(kept, PROMPTS, SimpleNamespace(index=0, count=1))
    with up_to_drawing(kept):
        drawn(kept)
    batches = (PROMPTS, PROMPTS[::-1], PROMPTS[1:], [""], ["", PROMPTS[0]])
    conds = [(kept.encode_text(batch), base.encode_text(batch)) for batch in batches]
    kept.text_cache.encoders.free()
    conds += [(kept.encode_text(batch), base.encode_text(batch)) for batch in batches]
    for one, other in conds:
        assert one.prompts == other.prompts and torch.equal(one.embeds, other.embeds)
        parts = [(one.pooled, other.pooled), (one.mask, other.mask)]
        assert all(a is b is None or torch.equal(a, b) for a, b in parts)
    torch.testing.assert_close(drawn(kept), drawn(base), rtol=1e-4, atol=1e-5)  # slices of its VAE round differently
    assert "loaded again" not in caplog.text


def test_adapters_that_are_off_leave_the_plain_pipeline_bit_for_bit(folder: Path, policy: Policy) -> None:
    with policy.switched_off():
        off = drawn(policy.backbone)
    assert torch.equal(off, drawn_by(plain(folder), policy.backbone))
    assert not torch.equal(off, drawn(policy.backbone))


@torch.no_grad()
def test_latents_lead_back_to_the_autoencoder_s_images(base: Backbone) -> None:
    images = torch.rand(2, 3, base.resolution, base.resolution, generator=torch.Generator().manual_seed(0))
    latents, vae = base.encode_images(images), base.pipeline.vae
    assert latents.shape == (2, *base.latent_shape)
    mode = base.autoencoder.encode(vae, 2 * images - 1).mode
    expected = (base.autoencoder.decode(vae, mode) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(base.decode(latents), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents, mode)  # scaled


def test_adapters_are_told_the_noise_level_whatever_the_model_s_own_time_is(base: Backbone) -> None:
    levels: list[Tensor] = []
    hook = base.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: levels.append(base.level_of_call(args, kwargs)), with_kwargs=True
    )
    t = torch.tensor([0.05, 0.731])
    with torch.no_grad():
        base.predict(normal(2, *base.latent_shape), t, base.encode_text(PROMPTS))
        drawn(base, 1.0)
    hook.remove()
    torch.testing.assert_close(levels[0].float(), t)
    seen = torch.stack([level.flatten()[0].float() for level in levels[1:]])
    torch.testing.assert_close(seen, base.sampler(3).t)


def test_it_says_whether_its_texts_are_masked(base: Backbone) -> None:
    assert base.masks_text == (base.encode_text(PROMPTS).mask is not None)


def test_a_row_does_not_depend_on_its_neighbour_s_text(policy: Policy) -> None:
    base, x_t, t = policy.backbone, normal(2, *policy.backbone.latent_shape), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        together = policy.live(x_t, t, base.encode_text(PROMPTS))
        for row in range(2):
            alone = policy.live(x_t[[row]], t[[row]], base.encode_text(PROMPTS[row : row + 1]))
            torch.testing.assert_close(together[[row]], alone, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(policy: Policy) -> None:
    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(predicted(policy).square().mean(), list(policy.parameters().values())))

    expected = gradients()
    base = policy.backbone
    enable_gradient_checkpointing(base.denoiser, base.adapters, base._attention)
    try:
        for got, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    finally:
        base.denoiser.disable_gradient_checkpointing()


def test_exported_adapters_draw_the_same_on_the_plain_pipeline(folder: Path, policy: Policy, tmp_path: Path) -> None:
    base = policy.backbone
    save_adapters(policy.adapters, tmp_path, metadata={})
    both, pipeline = drawn(base), plain(folder)
    untouched = drawn_by(pipeline, base)
    handle = attach(pipeline, tmp_path)
    torch.testing.assert_close(drawn_by(pipeline, base), both)
    handle.detach()
    assert torch.equal(drawn_by(pipeline, base), untouched)
    with policy.adapters["tokens"].using(None):
        lora_alone = drawn(base)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(drawn_by(pipeline, base), lora_alone, rtol=1e-4, atol=1e-5)


def test_lora_changes_every_block_by_default(base: Backbone) -> None:
    places = LoRA().places(base)
    names = [name for name, _ in base.denoiser.named_modules()]
    inside = [name.split(".") for name in names if name.count(".") > 1]  # of modules that have parts
    blocks = {".".join(parts[:2]) for parts in inside if parts[1].isdigit()}
    assert blocks
    assert not [block for block in blocks if not any(place.startswith(f"{block}.") for place in places)]


def test_every_objective_trains_soft_tokens_and_lora(kind: str, folder: Path) -> None:
    """The matrix of test_matrix.py in one step: a stack of all objectives, and the gradient of each."""
    recipe = Recipe.from_data(
        {
            "steps": 1,
            "backbone": {"use": "auto", "checkpoint": str(folder), **options_of(kind)},
            "adapters": {"tokens": {"use": "soft_tokens", "num_tokens": 2}, "lora": {"use": "lora", "rank": 2}},
            "sources": {name: {"use": name} | options | small(options) for name, options in SOURCES.items()},
            "objectives": [{"use": name, "source": SOURCE_OF[name], **OPTIONS.get(name, {})} for name in OBJECTIVES],
            "track": [],
        }
    )
    trainer = build_trainer(recipe)
    with torch.no_grad():
        for value in trainer.policy.parameters().values():
            value += 0.02  # a LoRA begins as nothing, where an anchor has no pull
    combine, kept = trainer.combine, []
    trainer.combine = lambda gradients, seed: kept.append(gradients) or combine(gradients, seed)
    metrics = trainer.run_step()
    for objective, gradient in zip(OBJECTIVES, kept[0], strict=True):
        assert torch.tensor(metrics[f"{objective}/loss"]).isfinite(), objective
        for adapter in ("tokens", "lora"):
            pull = sum(value.abs().sum().item() for name, value in gradient.items() if name.startswith(adapter))
            assert 0 < pull < float("inf"), (objective, adapter)


def test_the_published_size_takes_both_adapters(kind: str) -> None:
    with torch.device("meta"):
        pipeline = tiny(kind).make_full_size()
        base = backbone_of(pipeline)
        size = sum(parameter.numel() for parameter in base.denoiser.parameters()) / 1e9
        assert size == pytest.approx(tiny(kind).SIZE, rel=0.05)
        policy = Policy(base, {"tokens": SoftTokens(), "lora": LoRA(rank=32)})
        latents = torch.empty(1, *base.latent_shape)
        cond = base.encode_text(["a red circle"])
        assert policy.live(latents, torch.full((1,), 0.5), cond).shape == latents.shape
        assert base.decode(latents).shape == (1, 3, base.resolution, base.resolution)
    assert cond.embeds.shape[-1] == base._text_width()
