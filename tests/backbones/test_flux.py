"""FLUX.1: guidance as an input and classifier-free guidance, each as its plain pipeline has it, bit for bit."""

from pathlib import Path

import pytest
import torch
from tiny import options_of, save_kind
from tiny.flux import tiny_transformer
from torch import Tensor

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.flux import Flux
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw
from agsm_rl.policy import Policy

PROMPTS = ["a red circle", "two blue squares"]
LEVELS = torch.tensor([0.1234, 0.9])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kind("flux", tmp_path_factory.mktemp("tiny-flux"))


@pytest.fixture
def flux(folder: Path) -> Flux:
    return Flux(str(folder), **options_of("flux"))


def noise(backbone: Flux, seed: int) -> Tensor:
    return torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_both_kinds_of_guidance_draw_the_pipeline_s_pictures_bit_for_bit(folder: Path) -> None:
    drawn = []
    for embedded, guidance in ((3.5, 1.0), (1.5, 1.0), (1.5, 3.0)):
        flux = Flux(str(folder), embedded_guidance=embedded, resolution=(16, 24), **options_of("flux"))
        drawn.append(draw(flux, PROMPTS, [3, 4], guidance=guidance, num_steps=4))
        cond, uncond = flux.encode_text(PROMPTS), flux.encode_text(["", ""])
        x_t, sampler = torch.cat([noise(flux, seed) for seed in (3, 4)]), flux.sampler(4)
        for k, t in enumerate(sampler.t):
            flow = flux.predict(x_t, t.expand(2), cond)
            if guidance > 1:  # in two calls, as the pipeline, since a batch of both rounds differently
                without = flux.predict(x_t, t.expand(2), uncond)
                flow = without + guidance * (flow - without)
            x_t, _ = sampler.transition(k, x_t, flow, eta=0.0)
        assert torch.equal(flux.decode(x_t), drawn[-1])
    assert not torch.allclose(drawn[0], drawn[1]) and not torch.allclose(drawn[1], drawn[2])


@torch.no_grad()
def test_tokens_stand_in_front_of_each_block_s_text_without_positions(flux: Flux) -> None:
    """Block by block by hand, past all hooks, in two double-stream blocks and a single-stream one."""
    tokens = SoftTokens(num_tokens=3, layers=3)
    tokens.attach(flux)
    values = dict(tokens.named_parameters())
    for value in values.values():
        value.data += torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    net, cond, x_t = flux.denoiser, flux.encode_text(PROMPTS), torch.cat([noise(flux, 1), noise(flux, 2)])
    temb = net.time_text_embed(LEVELS * 1000, torch.full((2,), 3500.0), cond.pooled)
    patches = x_t.reshape(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
    image, text = net.x_embedder(patches), net.context_embedder(cond.embeds)
    places = [[0, 0, 0]] * text.shape[1] + [[0, y, x] for y in range(4) for x in range(4)]
    for layer, block in enumerate([*net.transformer_blocks, *net.single_transformer_blocks]):
        rows, count = text[:, :0], 3 if layer < 3 else 0
        if count:
            times = values["time_tokens"][[12, 90]][:, layer * 32 : (layer + 1) * 32]
            rows = values["soft_tokens"][0, layer] + times[:, None]
        rotary = net.pos_embed(torch.tensor([[0, 0, 0]] * count + places))
        text, image = type(block).forward(block, image, torch.cat([rows, text], dim=1), temb, rotary)
        text = text[:, count:]
    flow = net.proj_out(net.norm_out(image, temb))
    expected = flow.reshape(2, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 8)
    torch.testing.assert_close(flux.predict(x_t, LEVELS, cond), expected, rtol=1e-4, atol=1e-5)
    with tokens.using(None):
        assert not torch.allclose(flux.predict(x_t, LEVELS, cond), expected, rtol=1e-2, atol=1e-3)


def test_pictures_may_be_drawn_at_another_embedded_guidance_than_is_trained(folder: Path) -> None:
    flux = Flux(str(folder), embedded_guidance=1.0, drawn_guidance=3.5, **options_of("flux"))
    assert flux.embedded_guidance == 1.0 and flux.call_options["guidance_scale"] == 3.5


def test_a_checkpoint_without_embedded_guidance_has_none_and_refuses_one(flux: Flux) -> None:
    flux.pipeline.transformer = tiny_transformer(guidance_embeds=False)
    schnell = Flux.from_pipeline(flux.pipeline)
    assert "guidance_scale" not in schnell.call_options and schnell.drawing == (1.0, 4)
    with torch.no_grad():
        assert schnell.predict(noise(schnell, 1), LEVELS[:1], schnell.encode_text(PROMPTS[:1])).isfinite().all()
    schnell.embedded_guidance = 3.5
    with pytest.raises(UserError, match=r"embedded_guidance: 3.5, but the denoiser of this checkpoint has no"):
        schnell._check_guidance()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t5_length": 513}, r"backbone\.t5_length: got 513; diffusers allows 1 to 512"),
        ({"embedded_guidance": -1.0}, r"backbone\.embedded_guidance: -1; it must be 0 or more"),
        ({"drawn_guidance": float("nan")}, r"backbone\.drawn_guidance: nan; it must be 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(folder: Path, options, message) -> None:
    with pytest.raises(UserError, match=message):
        Flux(str(folder), device="cpu", **options)


def test_a_lora_of_the_clip_learns_through_the_pooled_text(flux: Flux) -> None:
    policy = Policy(flux, {"lora": LoRA(rank=2, text_encoders=True)})
    prediction = policy.live(torch.cat([noise(flux, 1), noise(flux, 2)]), LEVELS, flux.encode_text(PROMPTS))
    prediction.square().mean().backward()
    pulls = {name: value.grad.abs().sum() for name, value in policy.parameters().items() if value.grad is not None}
    assert any(pull > 0 for name, pull in pulls.items() if "text_encoder." in name)
