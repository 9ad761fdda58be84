"""Z-Image: text as a chat message, the pipeline's forms of guidance bit for bit, soft tokens' places, and Turbo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_kind

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.adapters.token_places import BlockCall, argument_positions
from agsm_rl.backbones.z_image import ZImage, _append
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw
from agsm_rl.policy import Policy
from agsm_rl.training.guidance import guiding
from agsm_rl.training.sampling import guided

PROMPTS = ["a red circle", "two blue squares above a green triangle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kind("z_image", tmp_path_factory.mktemp("tiny-z-image"))


@pytest.fixture
def make(folder: Path):
    return lambda **options: ZImage(str(folder), device="cpu", **options)


def noise(backbone: ZImage, seed: int) -> torch.Tensor:
    return torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize(
    ("guidance", "forms"),
    [(1.0, {}), (5.0, {}), (5.0, {"cfg_normalization": 0.9}), (5.0, {"cfg_truncation": 0.2})],
)
def test_guided_steps_are_the_pipeline_s_bit_for_bit(make, guidance: float, forms: dict[str, Any]) -> None:
    backbone = make(**forms)
    expected = backbone.pipeline(
        PROMPTS.copy(),
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=4,
        guidance_scale=guidance - 1,
        output_type="latent",
        height=16,
        width=16,
        **forms,
    ).images
    x_t, sampler = torch.cat([noise(backbone, 3), noise(backbone, 4)]), backbone.sampler(4)
    cond, uncond = backbone.encode_text(PROMPTS), backbone.encode_text([""])
    for k, t in enumerate(sampler.t):
        prediction = guided(backbone.predict, x_t, t.expand(2), cond, uncond, guidance)
        x_t, _ = sampler.transition(k, x_t, prediction, eta=0.0)
    if "cfg_truncation" in forms:  # without guidance the pipeline's batch is half as large, and rounds differently
        torch.testing.assert_close(x_t, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(x_t, expected)
    assert forms.items() <= backbone.call_options.items()


def test_an_exact_tie_ends_guidance_as_in_the_pipeline(make) -> None:
    uncond, cond = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    t = torch.tensor([0.7, 0.75])  # 1 - t is 0.3 and 0.25; in float32, 0.3 is a little above Python's
    guided = make(cfg_truncation=0.3).combine(uncond, cond, 3.0, t)
    assert guided[:, 0, 0, 0].tolist() == [1, 3]


@torch.no_grad()
def test_a_prompt_is_read_as_a_chat_message_and_its_padding_is_dropped(make) -> None:
    backbone = make()
    texts = [*PROMPTS, "circle " * 600, PROMPTS[0]]
    cond, (expected, _) = backbone.encode_text(texts), backbone.pipeline.encode_prompt(texts.copy())
    for row, caption in enumerate(expected):
        assert torch.equal(cond.embeds[row][cond.mask[row]], caption)
    short, _, long, _ = backbone.read_tokens(texts)
    assert len(short.ids) == len(expected[0]) and not short.is_cut
    assert backbone.pipeline.tokenizer.decode(short.ids).startswith("<|im_start|>user\na red circle<|im_end|>")
    assert len(long.ids) == len(expected[2]) == 512 and long.is_cut
    assert backbone.token_limit == 512 - len(backbone.read_tokens([""])[0].ids)


def test_soft_tokens_are_seen_and_stand_where_the_model_counts_from(make) -> None:
    block = make().denoiser.layers[0]
    positions = torch.tensor([[1, 0, 0], [33, 0, 0], [33, 0, 1]], dtype=torch.int32)
    embed = make().denoiser.rope_embedder
    mask, sequence = torch.tensor([[True, True, False]]), torch.zeros(1, 3, 32)
    call = BlockCall([sequence, mask, embed(positions)[None]], {}, argument_positions(block))
    _append(call, torch.ones(1, 2, 32))
    assert call.get("attn_mask").tolist() == [[True, True, False, True, True]]
    assert call.get("x")[0, :, 0].tolist() == [0, 0, 0, 1, 1]
    origin = torch.zeros(2, 3, dtype=torch.int32)
    assert torch.equal(call.get("freqs_cis")[0], embed(torch.cat([positions, origin])))


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["empty", "same"])
def test_guidance_from_the_negative_bank_is_drawn_as_it_is_predicted(make, prompt: Any) -> None:
    backbone, tokens = make(), SoftTokens(guidance_bank="negative", guidance_prompt=prompt)
    policy = Policy(backbone, {"tokens": tokens})
    for _, value in tokens.named_parameters():
        value.data += torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    drawn = draw(backbone, PROMPTS, [3, 4], guidance=3.0, num_steps=2)
    cond, uncond = backbone.encode_text(PROMPTS), backbone.encode_text([""])
    x_t, sampler = torch.cat([noise(backbone, 3), noise(backbone, 4)]), backbone.sampler(2)
    for k, t in enumerate(sampler.t):
        x_t, _ = sampler.transition(k, x_t, guided(policy.live, x_t, t.expand(2), cond, uncond, 3.0), eta=0.0)
    torch.testing.assert_close(backbone.decode(x_t), drawn, rtol=1e-4, atol=1e-5)
    with guiding([tokens], "positive", "empty"):
        assert not torch.allclose(draw(backbone, PROMPTS, [3, 4], guidance=3.0, num_steps=2), drawn, atol=1e-3)


def test_turbo_is_drawn_in_8_steps_without_guidance(make) -> None:
    backbone = make()
    assert backbone.drawing == (5.0, 50)
    backbone.pipeline.scheduler.register_to_config(shift=3.0)
    assert backbone.drawing == (1.0, 8)


def test_forms_of_guidance_below_0_are_refused(make) -> None:
    with pytest.raises(UserError, match=r"backbone\.cfg_normalization: got -1"):
        make(cfg_normalization=-1)
