"""DoRA, rsLoRA, LoKr, LoHa and OFT: exact when off, two banks, one bank per row, and what a policy does with them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agsm_rl.adapters.loha import LoHa
from agsm_rl.adapters.lokr import LoKr
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.oft import OFT
from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Adapter
from agsm_rl.policy import Policy

PROMPTS = ["a red circle", "two blue squares"]
KINDS: dict[str, Any] = {
    "dora": lambda **more: LoRA(rank=2, use_dora=True, **more),
    "rslora": lambda **more: LoRA(rank=4, alpha=3, use_rslora=True, rank_pattern={"to_k": 2}, **more),
    "lokr": lambda **more: LoKr(rank=2, alpha=3, decompose_both=True, decompose_factor=4, **more),
    "loha": lambda **more: LoHa(rank=2, alpha=1, alpha_pattern={"to_k": 3}, **more),
    "oft": lambda **more: OFT(oft_block_size=8, **more),
}


def point(backbone: StableDiffusion) -> tuple[Tensor, Tensor, Any]:
    x_t = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(7))
    return x_t, torch.tensor([0.1234, 0.9]), backbone.encode_text(PROMPTS)


@torch.no_grad()
def predict(backbone: StableDiffusion) -> Tensor:
    return backbone.predict(*point(backbone))


def disturb(adapter: Adapter, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def anatomy(backbone: StableDiffusion) -> list[Any]:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in backbone.denoiser.modules()]
    return [*((name, type(module)) for name, module in backbone.denoiser.named_modules()), *hooks]


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_base_switches_exactly_and_is_taken_back_from_its_export(
    kind: str, backbone: StableDiffusion
) -> None:
    base, parts = predict(backbone), anatomy(backbone)
    adapter = KINDS[kind](banks=2)
    adapter.attach(backbone)
    assert torch.equal(predict(backbone), base)
    disturb(adapter)
    positive = predict(backbone)
    with adapter.using("negative"):
        negative = predict(backbone)
        with adapter.using(None):
            assert torch.equal(predict(backbone), base)
    assert not any(torch.allclose(one, other) for one, other in ((positive, base), (positive, negative)))
    with adapter.using(("negative", "positive")):
        torch.testing.assert_close(predict(backbone), torch.stack([negative[0], positive[1]]), rtol=0, atol=1e-6)
    tensors, metadata = adapter.export()
    adapter.detach()
    assert torch.equal(predict(backbone), base) and anatomy(backbone) == parts
    again = type(adapter).from_export(tensors, metadata)
    again.attach(backbone)
    again.load_export(tensors, metadata)
    assert torch.equal(predict(backbone), positive)
    with again.using("negative"):
        assert torch.equal(predict(backbone), negative)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_has_its_ema_its_reference_and_its_state_and_checkpointing_changes_no_gradient(
    kind: str, backbone: StableDiffusion
) -> None:
    base = predict(backbone)
    policy = Policy(backbone, {"x": KINDS[kind]()}, ema_decay=0.5)
    disturb(policy.adapters["x"])
    policy.update_ema(1)
    state = policy.state_dict()
    with torch.no_grad():
        live, ema, reference = (each(*point(backbone)) for each in (policy.live, policy.ema, policy.reference))
    assert torch.equal(reference, base) and not torch.allclose(live, ema) and not torch.allclose(ema, base)
    disturb(policy.adapters["x"], seed=1)
    policy.load_state_dict(state)
    assert torch.equal(predict(backbone), live) and torch.equal(policy.ema(*point(backbone)), ema)

    def gradients() -> tuple[Tensor, ...]:
        loss = policy.live(*point(backbone)).square().mean()
        return torch.autograd.grad(loss, list(policy.parameters().values()))

    plain = gradients()
    enable_gradient_checkpointing(backbone.denoiser, backbone.adapters, nullcontext)
    for one, other in zip(plain, gradients(), strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_dora_starts_at_a_bfloat16_base_too(tiny_checkpoint: Path) -> None:
    backbone = StableDiffusion(str(tiny_checkpoint), dtype="bfloat16", device="cpu")
    base = predict(backbone)
    lora = LoRA(rank=2, use_dora=True)
    lora.attach(backbone)
    assert torch.equal(predict(backbone), base)
    assert {parameter.dtype for _, parameter in lora.named_parameters()} == {torch.float32}


def test_kinds_that_add_share_layers_in_any_order_and_others_are_refused_there(backbone: StableDiffusion) -> None:
    base, parts = predict(backbone), anatomy(backbone)
    lora, lokr = LoRA(rank=2), LoKr(rank=2)
    for adapter in (lora, lokr):
        adapter.attach(backbone)
        disturb(adapter)
    both = predict(backbone)
    with lora.using(None):
        only_lokr = predict(backbone)
    for other in (LoRA(use_dora=True), OFT()):
        with pytest.raises(UserError, match=r"already has an adapter \(positive_2\).*depend on their order"):
            other.attach(backbone)
    lora.detach()
    assert torch.equal(predict(backbone), only_lokr) and not torch.allclose(only_lokr, both)
    with pytest.raises(UserError, match=r"loha.target_modules: PEFT cannot put a LoHa there .*not supported"):
        LoHa(target_modules=("mid_block",)).attach(backbone)
    assert torch.equal(predict(backbone), only_lokr)
    lokr.detach()
    assert torch.equal(predict(backbone), base) and anatomy(backbone) == parts


def test_weights_packed_in_few_bits_are_refused_before_anything_changes(backbone: StableDiffusion) -> None:
    parts = anatomy(backbone)
    layer = backbone.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1), requires_grad=False)  # as bitsandbytes
    for adapter in (LoKr(), LoRA(use_dora=True)):
        with pytest.raises(UserError, match=r"the weight of unet.mid_block.*to_q is packed in few bits.*Use `lora`"):
            adapter.attach(backbone)
    assert anatomy(backbone) == parts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(use_rslora=True), "use_rslora: needs `alpha`"),
        (lambda: LoRA(rank_pattern={"to_k": 0}), r"rank_pattern\['to_k'\] is 0"),
        (lambda: LoRA(rank_pattern={"to_.*": 4}), "regular expressions are not"),
        (lambda: LoKr(decompose_factor=0), "decompose_factor: 0; allowed: -1, or 1 or more"),
        (lambda: LoHa(rank=5000), "loha.rank: 5000; allowed: 1 to 4096"),
        (lambda: OFT(oft_block_size=1), "oft_block_size: 1; allowed: 2 to"),
        (lambda: OFT(banks=3), "oft.banks: 3"),
    ],
)
def test_options_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_rank_or_an_alpha_of_no_layer_is_refused(backbone: StableDiffusion) -> None:
    parts = anatomy(backbone)
    with pytest.raises(UserError, match=r"lora.rank_pattern: no .* ends in 'to_kk'; the first of them is unet\."):
        LoRA(rank_pattern={"to_k": 2, "to_kk": 2}).attach(backbone)
    with pytest.raises(UserError, match=r"loha.alpha_pattern: .* ends in 'conv1'"):
        LoHa(alpha_pattern={"conv1": 2}).attach(backbone)
    assert anatomy(backbone) == parts


def test_an_export_with_other_options_than_the_adapter_s_is_refused(backbone: StableDiffusion) -> None:
    scaled = LoRA(rank=4, alpha=3, use_rslora=True)
    scaled.attach(backbone)
    tensors, metadata = scaled.export()
    scaled.detach()
    plain = LoRA(rank=4, alpha=3)
    plain.attach(backbone)
    with pytest.raises(UserError, match=r"alpha is 6 in the file, 3 here: .* 0.5 times .* Set `alpha: 6`"):
        plain.load_export(tensors, metadata)
    plain.detach()
    exact = OFT(oft_block_size=8, use_cayley_neumann=False)
    exact.attach(backbone)
    tensors, metadata = exact.export()
    exact.detach()
    series = OFT(oft_block_size=8)
    series.attach(backbone)
    with pytest.raises(UserError, match="use_cayley_neumann is False in the file, True here"):
        series.load_export(tensors, metadata)
