"""FLUX.2 [klein]: equal to its plain pipeline, bit for bit, and soft tokens in both kinds of blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_kind
from tiny.flux_2 import OPTIONS
from torch import Tensor

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.flux_2 import Flux2Klein
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw
from agsm_rl.policy import Policy
from agsm_rl.training.guidance import guiding
from agsm_rl.training.sampling import guided
from agsm_rl.training.sizes import drawing_at

PROMPTS = ["a red circle", "two blue squares"]
TEXT = OPTIONS["text_length"]
LEVELS = torch.tensor([0.1234, 0.9])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kind("flux_2", tmp_path_factory.mktemp("tiny-flux-2"))


@pytest.fixture
def klein(folder: Path) -> Flux2Klein:
    return Flux2Klein(str(folder), device="cpu", text_length=TEXT)


def noise(backbone: Flux2Klein, seed: int) -> Tensor:
    return torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_text_images_and_every_step_are_the_pipeline_s_bit_for_bit(klein: Flux2Klein) -> None:
    pipeline = klein.pipeline
    expected, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=TEXT)
    assert torch.equal(klein.encode_text(PROMPTS).embeds, expected)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(klein.encode_images(images), pipeline._encode_vae_image(2 * images - 1, None))
    cond = klein.encode_text(PROMPTS)
    for guidance, negative, size in ((1.0, "", 16), (3.0, "", (16, 24)), (3.0, "dull", 16)):
        with drawing_at(klein, size):
            drawn = draw(klein, PROMPTS, [3, 4], guidance=guidance, num_steps=4, negative_prompt=negative or None)
            x_t, sampler = torch.cat([noise(klein, seed) for seed in (3, 4)]), klein.sampler(4)
        uncond = klein.encode_text([negative]).expand(2)
        for k, t in enumerate(sampler.t):
            flow = klein.predict(x_t, t.expand(2), cond)
            if guidance > 1:  # in two calls, as the pipeline, since a batch of both rounds differently
                without = klein.predict(x_t, t.expand(2), uncond)
                flow = without + guidance * (flow - without)
            x_t, _ = sampler.transition(k, x_t, flow, eta=0.0)
        assert torch.equal(klein.decode(x_t), drawn)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
def test_tokens_stand_in_front_of_each_block_s_text_at_the_positions_after_the_longest(
    klein: Flux2Klein, layers: int
) -> None:
    """Block by block by hand, past all hooks, with the tokens and their positions put in."""
    tokens = SoftTokens(num_tokens=3, layers=layers)
    tokens.attach(klein)
    values = dict(tokens.named_parameters())
    for value in values.values():
        value.data += torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    net, cond, x_t = klein.denoiser, klein.encode_text(PROMPTS), torch.cat([noise(klein, 1), noise(klein, 2)])
    temb = net.time_guidance_embed(LEVELS * 1000, None)
    image, text = net.x_embedder(x_t.flatten(2).transpose(1, 2)), net.context_embedder(cond.embeds)
    places = [[0, 0, 0, row] for row in range(TEXT)] + [[0, y, x, 0] for y in range(4) for x in range(4)]
    plain = net.pos_embed(torch.tensor(places))
    longer = net.pos_embed(torch.tensor([[0, 0, 0, 512 + row] for row in range(3)] + places))
    mods = (net.double_stream_modulation_img(temb), net.double_stream_modulation_txt(temb))
    joint: Any = None
    for layer, block in enumerate([*net.transformer_blocks, *net.single_transformer_blocks]):
        forward, with_tokens = type(block).forward, layer < layers
        times = values["time_tokens"][[12, 90]][:, layer * 32 : (layer + 1) * 32] if with_tokens else None
        rows = values["soft_tokens"][0, layer] + times[:, None] if with_tokens else image[:, :0]
        rotary, count = (longer if with_tokens else plain), rows.shape[1]
        if layer < len(net.transformer_blocks):
            text, image = forward(block, image, torch.cat([rows, text], dim=1), *mods, rotary)
            text = text[:, count:]
        else:
            joint = torch.cat([text, image], dim=1) if joint is None else joint
            joint = forward(block, torch.cat([rows, joint], dim=1), None, net.single_stream_modulation(temb), rotary)
            joint = joint[:, count:]
    expected = net.proj_out(net.norm_out(joint[:, TEXT:], temb)).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(klein.predict(x_t, LEVELS, cond), expected, rtol=1e-4, atol=1e-5)
    with tokens.using(None):
        assert not torch.allclose(klein.predict(x_t, LEVELS, cond), expected, rtol=1e-2, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["empty", "same"])
def test_guidance_from_the_negative_bank_is_drawn_as_it_is_predicted(klein: Flux2Klein, prompt: Any) -> None:
    tokens = SoftTokens(guidance_bank="negative", guidance_prompt=prompt)
    policy = Policy(klein, {"tokens": tokens})
    for _, value in tokens.named_parameters():
        value.data += torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    drawn = draw(klein, PROMPTS, [3, 4], guidance=3.0, num_steps=3)
    cond, uncond = klein.encode_text(PROMPTS), klein.encode_text([""])
    x_t, sampler = torch.cat([noise(klein, seed) for seed in (3, 4)]), klein.sampler(3)
    for k, t in enumerate(sampler.t):
        x_t, _ = sampler.transition(k, x_t, guided(policy.live, x_t, t.expand(2), cond, uncond, 3.0), eta=0.0)
    torch.testing.assert_close(klein.decode(x_t), drawn, rtol=1e-4, atol=1e-5)
    with tokens.using("positive"), guiding([tokens], "positive", "empty"):
        assert not torch.allclose(draw(klein, PROMPTS, [3, 4], guidance=3.0, num_steps=3), drawn, atol=1e-3)
    assert "cache_context" not in vars(klein.denoiser)


def test_what_is_read_of_a_prompt_has_the_chat_around_it_and_is_cut_at_text_length(klein: Flux2Klein) -> None:
    short, long = klein.read_tokens(["red", "red " * 99])
    spoken = klein.pipeline.tokenizer.decode(short.ids)
    assert spoken.startswith("<|im_start|>user\nred<|im_end|>") and spoken.endswith("</think>\n\n")
    assert not short.is_cut and long.is_cut and len(long.ids) == klein.token_limit == TEXT
    before = klein.identity("text")
    klein.pipeline.tokenizer.chat_template += "again"
    assert klein.identity("text") != before


def test_a_distilled_checkpoint_draws_without_guidance_alone(klein: Flux2Klein) -> None:
    assert klein.drawing == (4.0, 50)
    klein.pipeline.register_to_config(is_distilled=True)
    assert klein.drawing == (1.0, 4) and klein.guidance_arguments(1.0, None, 2) == {"guidance_scale": 1.0}
    with pytest.raises(UserError, match=r"guidance: 4, but this FLUX.2 is distilled"):
        klein.guidance_arguments(4.0, None, 2)


def test_a_text_length_that_the_model_does_not_read_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.text_length: got 513; 1 to 512"):
        Flux2Klein(str(folder), device="cpu", text_length=513)
    with pytest.raises(UserError, match=r"backbone\.text_length: got 4, but the chat around a prompt takes \d+ tokens"):
        Flux2Klein(str(folder), device="cpu", text_length=4)
