"""Soft tokens: where they go, what they are made of, and that without them the base is exact."""

import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attached_tokens import PROMPTS, attached, perturb, predict, rows, texts_seen
from torch import Tensor

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.backbones.frozen_pipeline import FrozenPipeline
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.errors import UserError


@pytest.mark.parametrize("bank", ["positive", "negative"])
def test_down_and_mid_blocks_see_the_tokens_after_bos_and_up_blocks_the_plain_prompt(
    backbone: StableDiffusion, bank: Any
) -> None:
    tokens = attached(backbone)
    values = dict(tokens.named_parameters())
    with tokens.using(bank):
        seen = texts_seen(backbone, lambda: predict(backbone))
    text = backbone.encode_text(PROMPTS).embeds
    soft = values["soft_tokens"][0 if bank == "positive" else 1] + values["time_tokens"][[12, 90]][:, None]
    expected = torch.cat([text[:, :1], soft, text[:, 1:]], dim=1)
    assert len(seen) == 7  # two down, one mid, four up
    for name, given in seen.items():
        assert torch.equal(given, text if name.startswith("up_blocks") else expected), name


def test_the_attention_over_the_tokens_is_the_one_computed_by_hand(backbone: StableDiffusion) -> None:
    tokens = attached(backbone)
    attention = backbone.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    kept: dict[str, Tensor] = {}
    attention.register_forward_hook(lambda _, args, result: kept.update(hidden=args[0], result=result))
    predict(backbone)
    values = dict(tokens.named_parameters())
    text = backbone.encode_text(PROMPTS).embeds
    soft = values["soft_tokens"][0] + values["time_tokens"][[12, 90]][:, None]
    context = torch.cat([text[:, :1], soft, text[:, 1:]], dim=1)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    query = heads(attention.to_q(kept["hidden"]))
    key, value = heads(attention.to_k(context)), heads(attention.to_v(context))
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    expected = attention.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(kept["result"], expected, rtol=1e-4, atol=1e-5)


def test_switched_off_or_detached_the_base_is_exact(backbone: StableDiffusion) -> None:
    before = predict(backbone)
    tokens = attached(backbone)
    assert not torch.equal(predict(backbone), before)
    with tokens.using(None):
        assert torch.equal(predict(backbone), before)
    tokens.detach()
    assert torch.equal(predict(backbone), before)
    assert backbone.adapters == []
    for module in backbone.denoiser.modules():
        assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs


def test_blocks_of_using_nest_and_survive_an_error(backbone: StableDiffusion) -> None:
    tokens = attached(backbone)
    with tokens.using("negative"):
        with pytest.raises(ZeroDivisionError), tokens.using(None):
            raise ZeroDivisionError
        assert tokens.bank == "negative"
    assert tokens.bank == "positive"


def test_the_banks_begin_alike_and_differ_after_training(backbone: StableDiffusion) -> None:
    tokens = SoftTokens()
    tokens.attach(backbone)

    def both() -> list[Tensor]:
        results = []
        for bank in ("positive", "negative"):
            with tokens.using(bank):
                results.append(predict(backbone))
        return results

    positive, negative = both()
    assert torch.equal(positive, negative)
    perturb(tokens)
    positive, negative = both()
    assert not torch.allclose(positive, negative)


def test_one_bank_serves_under_both_names(backbone: StableDiffusion) -> None:
    tokens = attached(backbone, banks=1)
    with tokens.using("negative"):
        negative = predict(backbone)
    assert torch.equal(negative, predict(backbone))


def test_they_begin_as_the_empty_prompts_bos_with_small_time_rows(backbone: StableDiffusion) -> None:
    tokens = SoftTokens()
    tokens.attach(backbone)
    values = dict(tokens.named_parameters())
    begin = backbone.encode_text([""]).embeds[0, 0]
    assert values["soft_tokens"].shape == (2, 4, 32) and torch.equal(values["soft_tokens"][1, 3], begin)
    assert values["time_tokens"].shape == (100, 32)
    assert 0.018 < values["time_tokens"].std() < 0.022


def test_the_time_rows_come_from_the_seed(backbone: StableDiffusion) -> None:
    def drawn(seed: int) -> Tensor:
        tokens = SoftTokens(seed=seed)
        torch.rand(seed + 3)  # the global generator has no say
        tokens.attach(backbone)
        tokens.detach()
        return dict(tokens.named_parameters())["time_tokens"]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(("timestep", "row"), [(0, 0), (9, 0), (10, 1), (999, 99), (441.7, 44)])
def test_each_ten_timesteps_have_a_row(backbone: StableDiffusion, timestep: float, row: int) -> None:
    tokens = attached(backbone, num_tokens=1, banks=1)
    values = dict(tokens.named_parameters())
    text = backbone.encode_text(PROMPTS).embeds
    for given in (timestep, torch.tensor(timestep), torch.full((2,), timestep)):
        seen = texts_seen(backbone, lambda given=given: backbone.denoiser(rows(), given, text))
        inserted = seen["mid_block.attentions.0.transformer_blocks.0.attn2"][:, 1]
        assert torch.equal(inserted, (values["soft_tokens"][0] + values["time_tokens"][row]).expand(2, -1))


def test_without_time_tokens_the_tokens_are_the_same_at_all_times(backbone: StableDiffusion) -> None:
    tokens = attached(backbone, time_tokens=False)
    assert [name for name, _ in tokens.named_parameters()] == ["soft_tokens"]
    seen = texts_seen(backbone, lambda: predict(backbone))
    inserted = seen["mid_block.attentions.0.transformer_blocks.0.attn2"][:, 1:5]
    assert torch.equal(inserted, dict(tokens.named_parameters())["soft_tokens"][0].expand(2, -1, -1))


@torch.no_grad()
def test_calls_by_position_and_by_keyword_are_the_same(backbone: StableDiffusion) -> None:
    attached(backbone)
    x_t, t, text = rows(), torch.tensor([123, 900]), backbone.encode_text(PROMPTS).embeds
    unet = backbone.denoiser
    assert torch.equal(unet(x_t, t, text).sample, unet(sample=x_t, timestep=t, encoder_hidden_states=text).sample)
    block, hidden, time = unet.down_blocks[0], torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    by_position, _ = block(hidden, time, text)
    by_keyword, _ = block(hidden_states=hidden, temb=time, encoder_hidden_states=text)
    assert torch.equal(by_position, by_keyword)


@torch.no_grad()
def test_a_mask_of_the_prompt_lets_the_tokens_be_seen(backbone: StableDiffusion) -> None:
    tokens = attached(backbone)
    text = backbone.encode_text(PROMPTS).embeds
    call = {"sample": rows(), "timestep": 5, "encoder_hidden_states": text}
    mask = torch.ones(text.shape[:2])
    plain = backbone.denoiser(**call).sample
    all_seen = backbone.denoiser(**call, encoder_attention_mask=mask).sample
    torch.testing.assert_close(all_seen, plain, rtol=1e-4, atol=1e-5)
    mask[:, 5:] = 0
    masked = backbone.denoiser(**call, encoder_attention_mask=mask).sample
    call["encoder_hidden_states"] = text[:, :5]
    torch.testing.assert_close(masked, backbone.denoiser(**call).sample, rtol=1e-4, atol=1e-5)
    with tokens.using(None):
        assert not torch.allclose(masked, backbone.denoiser(**call).sample)


@torch.no_grad()
def test_guidance_in_one_batch_puts_the_tokens_on_both_branches(backbone: StableDiffusion) -> None:
    attached(backbone)
    text = backbone.encode_text(["", *PROMPTS]).embeds
    x_t = rows()
    both = backbone.denoiser(torch.cat([x_t, x_t]), 441, text[[0, 0, 1, 2]]).sample
    for half, embeds in zip(both.chunk(2), (text[[0, 0]], text[[1, 2]]), strict=True):
        torch.testing.assert_close(half, backbone.denoiser(x_t, 441, embeds).sample, rtol=1e-4, atol=1e-5)


def test_parameters_swapped_in_place_are_used_at_once(backbone: StableDiffusion) -> None:
    tokens = attached(backbone)
    before = predict(backbone)
    kept = {name: parameter.data for name, parameter in tokens.named_parameters()}
    for _, parameter in tokens.named_parameters():
        parameter.data = parameter.data + 0.5
    assert not torch.allclose(predict(backbone), before)
    for name, parameter in tokens.named_parameters():
        parameter.data = kept[name]
    assert torch.equal(predict(backbone), before)


@pytest.mark.parametrize("kinds", ["tokens", "lora", "both"])
@pytest.mark.parametrize("banks", [("positive",), ("negative",), ("positive", "negative")])
def test_gradient_checkpointing_changes_no_gradient(
    backbone: StableDiffusion, kinds: str, banks: tuple[Any, ...]
) -> None:
    adapters: list[Any] = [SoftTokens()] if kinds != "lora" else []
    adapters += [LoRA(rank=2, banks=2)] if kinds != "tokens" else []
    for adapter in adapters:
        adapter.attach(backbone)
    perturb(*adapters)
    parameters = [parameter for adapter in adapters for _, parameter in adapter.named_parameters()]

    def gradients() -> tuple[Tensor, ...]:
        loss = torch.zeros(())
        for number, bank in enumerate(banks):
            contexts = [adapter.using(bank) for adapter in adapters]
            for context in contexts:
                context.__enter__()
            loss = loss + (number + 1) * predict(backbone, gradients=True).square().mean()
            for context in reversed(contexts):
                context.__exit__(None, None, None)
        with_zeros = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        assert all(adapter.bank == "positive" for adapter in adapters)
        return with_zeros

    plain = gradients()
    runs = count_block_runs(backbone)
    enable_gradient_checkpointing(backbone.denoiser, backbone.adapters, nullcontext)
    checkpointed = gradients()
    assert runs["number"] == 2 * len(banks)  # it really did run the block again
    assert sum(gradient.abs().sum() for gradient in plain) > 0
    for first, second in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)


def count_block_runs(backbone: StableDiffusion) -> dict[str, int]:
    runs = {"number": 0}
    block = backbone.denoiser.mid_block.attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: runs.update(number=runs["number"] + 1))
    return runs


def test_the_constructor_s_gradient_checkpointing_is_on_and_leaves_evaluation_mode(tiny_checkpoint: Any) -> None:
    backbone = StableDiffusion(str(tiny_checkpoint), gradient_checkpointing=True, device="cpu")
    tokens = attached(backbone)
    runs = count_block_runs(backbone)
    predict(backbone, gradients=True).sum().backward()
    assert runs["number"] == 2 and not backbone.denoiser.training
    assert dict(tokens.named_parameters())["soft_tokens"].grad[0].abs().sum() > 0


def test_an_export_is_taken_back(backbone: StableDiffusion) -> None:
    tokens = attached(backbone, num_tokens=3)
    drawn = predict(backbone)
    tensors, metadata = tokens.export()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "soft_tokens": (2, 3, 32),
        "time_tokens": (100, 32),
    }
    options = {"banks": "2", "num_tokens": "3", "base": "stable_diffusion", "width": "32"}
    guidance = {"guidance_bank": "positive", "guidance_prompt": "empty"}
    assert metadata == {"kind": "soft_tokens", **options, **guidance}
    tokens.detach()
    again = SoftTokens.from_export(tensors, metadata)
    again.attach(backbone)
    again.load_export(tensors, metadata)
    assert torch.equal(predict(backbone), drawn)


def test_tokens_of_another_base_are_refused_with_its_name(backbone: StableDiffusion) -> None:
    tokens = attached(backbone)
    before = tokens.export()[0]
    other = {"soft_tokens": torch.zeros(2, 4, 2048), "time_tokens": torch.zeros(100, 2048)}
    with pytest.raises(UserError, match=r"2048 wide \(stable_diffusion_xl\); this base's are 32 wide"):
        tokens.load_export(other, {"base": "stable_diffusion_xl"})
    fewer = {"soft_tokens": torch.zeros(2, 3, 32), "time_tokens": torch.zeros(100, 32)}
    with pytest.raises(UserError, match=r"shape \(2, 3, 32\) in the file, \(2, 4, 32\) here"):
        tokens.load_export(fewer, {})
    with pytest.raises(UserError, match="no tensor 'time_tokens'"):
        tokens.load_export({"soft_tokens": torch.zeros(2, 4, 32)}, {})
    assert all(torch.equal(before[name], value) for name, value in tokens.export()[0].items())


def test_the_text_with_tokens_is_made_once_a_call_and_anew_in_the_next(
    backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = attached(backbone)
    x_t, cond, asked = rows(), backbone.encode_text(PROMPTS), []
    rows_for = tokens.rows_for
    monkeypatch.setattr(tokens, "rows_for", lambda *arguments: asked.append(1) or rows_for(*arguments))

    def seen(t: float, bank: Any = "positive") -> Tensor:
        with torch.no_grad(), tokens.using(bank):
            return backbone.predict(x_t, torch.tensor([t, t]), cond)

    first = seen(0.1)
    assert len(asked) == 1
    # The same text in each of these; what else the tokens depend on is another.
    others = [seen(0.5), seen(0.1, "negative"), seen(0.1, None)]
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(seen(0.1), first)
    perturb(tokens, seed=1)
    assert not torch.equal(seen(0.1), first)


def test_a_denoiser_without_cross_attention_is_refused(backbone: StableDiffusion) -> None:
    for block in (*backbone.denoiser.down_blocks, backbone.denoiser.mid_block):
        block.has_cross_attention = False
    with pytest.raises(UserError, match="no down or mid block"):
        SoftTokens().attach(backbone)


def test_a_kind_of_backbone_that_declares_no_places_takes_no_tokens(
    backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion, "token_places", FrozenPipeline.token_places)
    with pytest.raises(UserError, match="a StableDiffusionPipeline has no place for them yet; use lora"):
        SoftTokens().attach(backbone)


def test_options_that_cannot_be_are_refused(backbone: StableDiffusion) -> None:
    with pytest.raises(UserError, match="num_tokens: 0"):
        SoftTokens(num_tokens=0)
    with pytest.raises(UserError, match="banks: 3"):
        SoftTokens(banks=3)
    with pytest.raises(UserError, match="layers"):
        SoftTokens(layers=5).attach(backbone)


def test_on_a_bfloat16_base_the_tokens_stay_float32(tiny_checkpoint: Any) -> None:
    backbone = StableDiffusion(str(tiny_checkpoint), dtype="bfloat16", device="cpu")
    tokens = attached(backbone)
    seen = texts_seen(backbone, lambda: predict(backbone))
    assert {text.dtype for text in seen.values()} == {torch.bfloat16}
    assert {parameter.dtype for _, parameter in tokens.named_parameters()} == {torch.float32}


def test_every_option_is_keyword_only() -> None:
    for adapter in (SoftTokens, LoRA):
        options = inspect.signature(adapter).parameters.values()
        assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)


def test_tokens_begin_equal_as_published_and_differ_with_jitter(backbone):
    for jitter, equal in ((0.0, True), (0.1, False)):
        tokens = SoftTokens(jitter=jitter)
        tokens.attach(backbone)
        bank = dict(tokens.named_parameters())["soft_tokens"][0]
        assert torch.equal(bank[0], bank[1]) is equal
        tokens.detach()


def test_the_tokens_are_where_the_text_is(backbone: StableDiffusion) -> None:
    """As after `pipe.to("cuda")`, which moves the pipeline's own parts: meta stands for the other device."""
    tokens = SoftTokens(num_tokens=2)
    tokens.attach(backbone)
    text = torch.empty(2, 4, tokens._parameters["soft_tokens"].shape[-1], device="meta")
    for bank in ("positive", ("positive", "negative")):
        with tokens.using(bank):
            tokens._t = torch.tensor(0.01, device="meta")
            assert tokens.rows_for(text, 0).device.type == "meta"
