"""Both adapters on SD1.5, SDXL and SD3: exact when off, and at home with what runs the denoiser."""

from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import backbone_of, load_backbone
from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.interfaces import Backbone

PROMPTS = ["a red circle", "two blue squares"]
KINDS = {"tokens": (SoftTokens,), "lora": (LoRA,), "both": (SoftTokens, LoRA)}


def predict(backbone: Backbone, *, gradients: bool = False) -> Tensor:
    x_t = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(7))
    with torch.set_grad_enabled(gradients):
        return backbone.predict(x_t, torch.tensor([0.1234, 0.9]), backbone.encode_text(PROMPTS))


def attached(backbone: Backbone, kinds: str = "both") -> list[Any]:
    adapters: list[Any] = [kind(banks=2) for kind in KINDS[kinds]]
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters:
        adapter.attach(backbone)
        for _, parameter in adapter.named_parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapters


def anatomy(backbone: Backbone) -> list[Any]:
    parts = [(name, type(module), module.training) for name, module in backbone.denoiser.named_modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in backbone.denoiser.modules()]
    return [*parts, *hooks, *((name, p.data_ptr()) for name, p in backbone.denoiser.named_parameters())]


@pytest.mark.parametrize("kinds", list(KINDS))
def test_switched_off_or_detached_the_base_is_exact(each_backbone: Backbone, kinds: str) -> None:
    before, parts = predict(each_backbone), anatomy(each_backbone)
    adapters = attached(each_backbone, kinds)
    assert not torch.equal(predict(each_backbone), before)
    with ExitStack() as off:
        for adapter in adapters:
            off.enter_context(adapter.using(None))
        assert torch.equal(predict(each_backbone), before)
    for adapter in adapters:
        adapter.detach()
    assert torch.equal(predict(each_backbone), before) and anatomy(each_backbone) == parts


def test_both_branches_of_guidance_in_one_batch_are_what_they_are_alone(each_backbone: Backbone) -> None:
    attached(each_backbone)
    cond = each_backbone.encode_text(["", *PROMPTS])
    x_t = torch.randn(2, *each_backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.441, 0.441])
    with torch.no_grad():
        both = each_backbone.predict(torch.cat([x_t, x_t]), t.repeat(2), cond[[0, 0, 1, 2]])
        alone = [each_backbone.predict(x_t, t, cond[rows]) for rows in ([0, 0], [1, 2])]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bank", ["positive", "negative"])
def test_gradient_checkpointing_changes_no_gradient(each_backbone: Backbone, bank: Any) -> None:
    adapters = attached(each_backbone)
    parameters = [parameter for adapter in adapters for _, parameter in adapter.named_parameters()]

    def gradients() -> tuple[Tensor, ...]:
        with ExitStack() as banks:
            for adapter in adapters:
                banks.enter_context(adapter.using(bank))
            loss = predict(each_backbone, gradients=True).square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    plain = gradients()
    enable_gradient_checkpointing(each_backbone.denoiser, each_backbone.adapters, nullcontext)
    assert sum(gradient.abs().sum() for gradient in plain) > 0
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_under_bfloat16_autocast_predictions_stay_close_and_gradients_float32(each_backbone: Backbone) -> None:
    adapters = attached(each_backbone)
    exact = predict(each_backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = predict(each_backbone, gradients=True)
    torch.testing.assert_close(cast.float(), exact, rtol=0.1, atol=0.1)
    cast.float().square().mean().backward()
    for adapter in adapters:
        for name, parameter in adapter.named_parameters():
            if not name.startswith("negative."):
                assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    ("checkpoint", "how"),
    # SDXL's denoiser is of SD1.5's class, and wrapping depends on torch alone; tracing each takes half a minute.
    [("tiny_checkpoint", "in place"), ("tiny_sd3_checkpoint", "in place"), ("tiny_sd3_checkpoint", "wrapped")],
)
def test_a_compiled_denoiser_does_the_same_before_during_and_after(
    request: pytest.FixtureRequest, checkpoint: str, how: str
) -> None:
    backbone = load_backbone(str(request.getfixturevalue(checkpoint)), device="cpu")
    before = predict(backbone)
    adapters = attached(backbone, "tokens")
    (tokens,) = adapters
    values = dict(tokens.named_parameters())
    with_tokens = predict(backbone)
    with tokens.using("negative"):
        negative = predict(backbone)
    tokens.detach()
    part = "unet" if hasattr(backbone.pipeline, "unet") else "transformer"
    if how == "in place":
        backbone.denoiser.compile(backend="eager")
    else:
        setattr(backbone.pipeline, part, torch.compile(backbone.denoiser, backend="eager"))
        backbone = backbone_of(backbone.pipeline)
    torch.testing.assert_close(predict(backbone), before)
    again = SoftTokens(banks=2)
    again.attach(backbone)
    for name, parameter in again.named_parameters():
        parameter.data.copy_(values[name])
    torch.testing.assert_close(predict(backbone), with_tokens)
    with again.using("negative"):
        torch.testing.assert_close(predict(backbone), negative)
    with again.using(None):
        torch.testing.assert_close(predict(backbone), before)
    for _, parameter in again.named_parameters():
        parameter.data = parameter.data + 0.5  # as the EMA is swapped in
    assert not torch.allclose(predict(backbone), with_tokens)
    predict(backbone, gradients=True).square().mean().backward()
    assert dict(again.named_parameters())["soft_tokens"].grad[0].abs().sum() > 0
    again.detach()
    torch.testing.assert_close(predict(backbone), before)
    torch.compiler.reset()


def test_lora_reaches_sd3_s_text_stream_on_demand(sd3_backbone: Backbone) -> None:
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    default, wide = LoRA(rank=2), LoRA(rank=2, target_modules=targets)
    default.attach(sd3_backbone)
    count = len(list(default.named_parameters()))
    assert count == 2 * 4 * 4  # A and B of four projections in four blocks
    default.detach()
    wide.attach(sd3_backbone)
    assert len(list(wide.named_parameters())) == 2 * (4 * 8 - 1)  # the last block gives no text back
