"""Soft tokens in SD3's joint blocks: each layer's own, behind the text, and gone behind the block."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_pipelines import tiny_transformer
from torch import Tensor

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.backbones.stable_diffusion_3 import StableDiffusion3
from agsm_rl.errors import UserError

PROMPTS = ["a red circle", "two blue squares"]
LEVELS = torch.tensor([0.1234, 0.9])
TEXT = 20 + 256


def rows(seed: int = 7) -> Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def predict(backbone: StableDiffusion3, *, gradients: bool = False, levels: Tensor = LEVELS) -> Tensor:
    with torch.set_grad_enabled(gradients):
        return backbone.predict(rows(), levels, backbone.encode_text(PROMPTS))


def attached(backbone: StableDiffusion3, **options: Any) -> SoftTokens:
    tokens = SoftTokens(**options)
    tokens.attach(backbone)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in tokens.named_parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    return tokens


def expected_tokens(tokens: SoftTokens, layer: int, bank: int = 0) -> Tensor:
    """[B, n, D] for PROMPTS at LEVELS, from the published shapes: (banks, L, n, D) and (100, L·D)."""
    values = dict(tokens.named_parameters())
    width = values["soft_tokens"].shape[-1]
    times = values["time_tokens"][[12, 90]][:, layer * width : (layer + 1) * width]
    return values["soft_tokens"][bank, layer] + times[:, None]


@pytest.mark.parametrize("bank", ["positive", "negative"])
def test_the_first_layers_see_their_own_tokens_and_the_others_none(sd3_backbone: StableDiffusion3, bank: Any) -> None:
    tokens = attached(sd3_backbone, layers=2)
    given, returned = {}, {}
    for layer, block in enumerate(sd3_backbone.denoiser.transformer_blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: given.update({layer: kwargs["encoder_hidden_states"]}),
            with_kwargs=True,
        )
        block.register_forward_hook(lambda _, args, result, layer=layer: returned.update({layer: result[0]}))
    with tokens.using(bank):
        predict(sd3_backbone)
    for layer in range(2):
        torch.testing.assert_close(
            given[layer][:, TEXT:], expected_tokens(tokens, layer, 0 if bank == "positive" else 1), rtol=0, atol=0
        )
        assert returned[layer].shape[1] == TEXT and torch.equal(given[layer + 1][:, :TEXT], returned[layer])
    assert given[2].shape[1] == given[3].shape[1] == TEXT and returned[3] is None


@torch.no_grad()
def test_the_whole_transformer_is_the_one_computed_by_hand(sd3_backbone: StableDiffusion3) -> None:
    """The joint blocks of arXiv 2403.03206, fig. 2, written out with the tokens in their places; no hook is in it."""
    tokens, net = attached(sd3_backbone, layers=3), sd3_backbone.denoiser
    cond, timestep = sd3_backbone.encode_text(PROMPTS), LEVELS * 1000
    image, text = net.pos_embed(rows()), net.context_embedder(cond.embeds)
    temb = F.silu(net.time_text_embed(timestep, cond.pooled))

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 16)).transpose(1, 2)

    for layer, block in enumerate(net.transformer_blocks):
        last = layer == len(net.transformer_blocks) - 1
        if layer < 3:
            text = torch.cat([text, expected_tokens(tokens, layer)], dim=1)
        of_image = block.norm1.linear(temb).chunk(6, dim=1)
        of_text = block.norm1_context.linear(temb).chunk(2 if last else 6, dim=1)
        # The last block's modulation of the text is (scale, shift), the others' (shift, scale, gate, …).
        x, c = norm(image, *of_image[:2]), norm(text, *(reversed(of_text) if last else of_text[:2]))
        attention = block.attn
        query = torch.cat([heads(attention.to_q(x)), heads(attention.add_q_proj(c))], dim=2)
        key = torch.cat([heads(attention.to_k(x)), heads(attention.add_k_proj(c))], dim=2)
        value = torch.cat([heads(attention.to_v(x)), heads(attention.add_v_proj(c))], dim=2)
        weights = (query @ key.transpose(-1, -2) / 16**0.5).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        image = image + of_image[2][:, None] * attention.to_out[0](mixed[:, : image.shape[1]])
        image = image + of_image[5][:, None] * block.ff(norm(image, *of_image[3:5]))
        if not last:
            text = text + of_text[2][:, None] * attention.to_add_out(mixed[:, image.shape[1] :])
            text = text + of_text[5][:, None] * block.ff_context(norm(text, *of_text[3:5]))
        text = text[:, :TEXT]
    scale, shift = net.norm_out.linear(temb).chunk(2, dim=1)
    patches = net.proj_out(norm(image, shift, scale)).reshape(2, 4, 4, 2, 2, 16)
    expected = torch.einsum("nhwpqc->nchpwq", patches).reshape(2, 16, 8, 8)
    torch.testing.assert_close(predict(sd3_backbone), expected, rtol=1e-4, atol=1e-5)
    with tokens.using(None):
        assert not torch.allclose(predict(sd3_backbone), expected, rtol=1e-3, atol=1e-4)


def test_tokens_and_times_have_the_published_shapes_and_spread(sd3_backbone: StableDiffusion3) -> None:
    tokens = SoftTokens()
    tokens.attach(sd3_backbone)
    values = dict(tokens.named_parameters())
    assert values["soft_tokens"].shape == (2, 4, 4, 32)  # 5 layers where there are as many
    assert values["time_tokens"].shape == (100, 4 * 32)
    for value in values.values():
        assert 0.018 < value.std() < 0.022 and value.mean().abs() < 0.002
    sd3_backbone.denoiser = tiny_transformer(num_layers=6)
    more = SoftTokens(num_tokens=3, banks=1)
    more.attach(sd3_backbone)
    assert dict(more.named_parameters())["soft_tokens"].shape == (1, 5, 3, 32)


@torch.no_grad()
def test_calls_by_position_and_by_keyword_are_the_same(sd3_backbone: StableDiffusion3) -> None:
    attached(sd3_backbone)
    cond, net, timestep = sd3_backbone.encode_text(PROMPTS), sd3_backbone.denoiser, torch.tensor([123.0, 900.0])
    by_position = net(rows(), cond.embeds, cond.pooled, timestep).sample
    by_keyword = net(
        hidden_states=rows(), timestep=timestep, pooled_projections=cond.pooled, encoder_hidden_states=cond.embeds
    ).sample
    assert torch.equal(by_position, by_keyword)
    block, image, text = net.transformer_blocks[0], torch.randn(2, 16, 32), torch.randn(2, 9, 32)
    given = block(image, text, torch.ones(2, 32))
    named = block(temb=torch.ones(2, 32), encoder_hidden_states=text, hidden_states=image)
    assert all(torch.equal(one, other) for one, other in zip(given, named, strict=True))
    assert given[0].shape == text.shape


@torch.no_grad()
def test_a_skipped_layer_takes_its_tokens_with_it(sd3_backbone: StableDiffusion3) -> None:
    """Skip-layer guidance of SD3.5: the layers after the skipped one keep their own tokens."""
    attached(sd3_backbone)
    cond, net = sd3_backbone.encode_text(PROMPTS), sd3_backbone.denoiser
    call = {"encoder_hidden_states": cond.embeds, "pooled_projections": cond.pooled, "timestep": torch.tensor([5.0])}
    skipped = net(rows(), **call, skip_layers=[1]).sample
    seen = {}
    net.transformer_blocks[2].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(text=kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    net(rows(), **call, skip_layers=[1])
    assert seen["text"].shape[1] == TEXT + 4 and skipped.isfinite().all()


def test_sd35_s_blocks_take_tokens_too(sd3_backbone: StableDiffusion3) -> None:
    net = tiny_transformer(dual_attention_layers=(0, 1), qk_norm="rms_norm").requires_grad_(False)
    sd3_backbone.denoiser = sd3_backbone.pipeline.transformer = net
    before = predict(sd3_backbone)
    tokens = attached(sd3_backbone)
    assert not torch.allclose(predict(sd3_backbone), before)
    with tokens.using(None):
        assert torch.equal(predict(sd3_backbone), before)


def test_a_block_run_again_is_given_the_timestep_of_its_first_run(sd3_backbone: StableDiffusion3) -> None:
    """Two predictions at different times before one backward pass, in blocks that hold the hooks themselves."""
    tokens = attached(sd3_backbone)
    parameters = [parameter for _, parameter in tokens.named_parameters()]

    def gradients() -> tuple[Tensor, ...]:
        first = predict(sd3_backbone, gradients=True, levels=torch.tensor([0.1, 0.2]))
        with tokens.using("negative"):
            second = predict(sd3_backbone, gradients=True, levels=torch.tensor([0.8, 0.9]))
        return torch.autograd.grad((first.square() + 2 * second.square()).mean(), parameters)

    plain = gradients()
    enable_gradient_checkpointing(sd3_backbone.denoiser, sd3_backbone.adapters, nullcontext)
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
    rows_used = plain[1].abs().sum(1).nonzero().flatten().tolist()
    assert rows_used == [10, 20, 80, 90]


def test_an_export_is_taken_back_with_its_layers(sd3_backbone: StableDiffusion3) -> None:
    tokens = attached(sd3_backbone, num_tokens=3, layers=2)
    drawn = predict(sd3_backbone)
    tensors, metadata = tokens.export()
    assert metadata["layers"] == "2" and metadata["width"] == "32" and metadata["base"] == "stable_diffusion_3"
    tokens.detach()
    again = SoftTokens.from_export(tensors, metadata)
    again.attach(sd3_backbone)
    again.load_export(tensors, metadata)
    assert torch.equal(predict(sd3_backbone), drawn)


def test_what_does_not_fit_is_refused(sd3_backbone: StableDiffusion3) -> None:
    with pytest.raises(UserError, match="layers: 9; this transformer has 4 blocks that take them"):
        SoftTokens(layers=9).attach(sd3_backbone)
    tokens = attached(sd3_backbone)
    other = {"soft_tokens": torch.zeros(2, 5, 4, 1536), "time_tokens": torch.zeros(100, 5 * 1536)}
    with pytest.raises(UserError, match=r"1536 wide; this base's are 32 wide \(stable_diffusion_3\)"):
        tokens.load_export(other, {})
    with pytest.raises(UserError, match=r"trained on a flux, this is a stable_diffusion_3"):
        tokens.load_export(tokens.export()[0], {"base": "flux"})
    fewer = {"soft_tokens": torch.zeros(2, 3, 4, 32), "time_tokens": torch.zeros(100, 96)}
    with pytest.raises(UserError, match=r"shape \(2, 3, 4, 32\) in the file, \(2, 4, 4, 32\) here"):
        tokens.load_export(fewer, {})


@pytest.mark.parametrize("options", [{"places": ["down"]}, {"init": "bos"}])
def test_what_only_a_u_net_has_is_refused(sd3_backbone, options) -> None:
    with pytest.raises(UserError, match=r"soft_tokens\.(places|init)"):
        SoftTokens(**options).attach(sd3_backbone)
