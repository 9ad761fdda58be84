"""Predictions with a bank for each row: one pass where every adapter can mix them, and the same as bank by bank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.interfaces import Backbone, Banks
from agsm_rl.policy import Policy

PROMPTS = ["a red circle", "two blue squares", "a star", "a red circle"]
BANKS: Banks = ("negative", "positive", "negative", "negative")
POSITIVE, NEGATIVE = [1], [0, 2, 3]
KINDS = ["tokens", "lora", "both"]


def make_policy(backbone: Backbone, kinds: str = "both", *, lora_banks: int = 2) -> Policy:
    adapters: dict[str, Any] = {"tokens": SoftTokens()} if kinds != "lora" else {}
    adapters |= {"lora": LoRA(rank=2, banks=lora_banks)} if kinds != "tokens" else {}
    policy = Policy(backbone, adapters)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    policy.restart_ema()
    return policy


def inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Any]:
    x_t = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(7))
    return x_t, torch.tensor([0.1234, 0.9, 0.5, 0.9]), backbone.encode_text(PROMPTS)


def gradients(policy: Policy, prediction: Tensor) -> list[Tensor]:
    weight = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(policy.parameters().values())
    return list(torch.autograd.grad((weight * prediction).sum(), parameters, allow_unused=True, materialize_grads=True))


def bank_by_bank(policy: Policy, which: str = "live") -> Tensor:
    x_t, t, cond = inputs(policy.backbone)
    predict, found = getattr(policy, which), torch.empty_like(x_t)
    for bank, rows in (("positive", POSITIVE), ("negative", NEGATIVE)):
        found[rows] = predict(x_t[rows], t[rows], cond[rows], bank=bank)
    return found


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def count_calls(backbone: Backbone) -> list[int]:
    rows: list[int] = []
    backbone.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize("kinds", KINDS)
def test_rows_of_different_banks_are_predicted_and_learned_as_bank_by_bank(each_backbone: Backbone, kinds: str) -> None:
    policy = make_policy(each_backbone, kinds)
    together, separate = policy.live(*inputs(each_backbone), bank=BANKS), bank_by_bank(policy)
    assert_close(together, separate)
    assert not torch.allclose(together, policy.live(*inputs(each_backbone)), rtol=1e-3, atol=1e-4)
    expected = gradients(policy, separate)
    assert sum(float(value.abs().sum()) for value in expected) > 0
    assert_close(gradients(policy, together), expected)
    with torch.no_grad():
        assert_close(policy.ema(*inputs(each_backbone), bank=BANKS), bank_by_bank(policy, "ema"))
    assert all(adapter.bank == "positive" for adapter in policy.adapters.values())


@pytest.mark.parametrize(
    ("kinds", "lora_banks", "calls"), [("tokens", 2, [4]), ("both", 1, [4]), ("lora", 2, [3, 1]), ("both", 2, [3, 1])]
)
def test_one_pass_serves_both_banks_unless_a_second_one_cannot_be_mixed(
    backbone: Backbone, kinds: str, lora_banks: int, calls: list[int]
) -> None:
    policy = make_policy(backbone, kinds, lora_banks=lora_banks)
    rows = count_calls(backbone)
    together = policy.live(*inputs(backbone), bank=BANKS)
    assert rows == calls
    assert_close(together, bank_by_bank(policy))


def test_rows_that_all_want_one_bank_are_one_pass_bit_for_bit(backbone: Backbone) -> None:
    policy = make_policy(backbone)
    rows = count_calls(backbone)
    alike: Banks = ("negative",) * 4
    assert torch.equal(policy.live(*inputs(backbone), bank=alike), policy.live(*inputs(backbone), bank="negative"))
    assert rows == [4, 4]


@pytest.mark.parametrize("kinds", KINDS)
def test_gradient_checkpointing_keeps_each_rows_bank(each_backbone: Backbone, kinds: str) -> None:
    policy = make_policy(each_backbone, kinds)
    plain = gradients(policy, policy.live(*inputs(each_backbone), bank=BANKS))
    enable_gradient_checkpointing(each_backbone.denoiser, each_backbone.adapters, each_backbone._attention)
    assert_close(gradients(policy, policy.live(*inputs(each_backbone), bank=BANKS)), plain)


def test_a_compiled_denoiser_keeps_each_rows_bank(each_checkpoint: Any) -> None:
    backbone = load_backbone(str(each_checkpoint), device="cpu")
    policy = make_policy(backbone, "tokens")
    expected = policy.live(*inputs(backbone), bank=BANKS)
    backbone.denoiser.compile(backend="eager")
    assert_close(policy.live(*inputs(backbone), bank=BANKS), expected)
    other: Banks = ("positive", "negative", "negative", "positive")
    found = policy.live(*inputs(backbone), bank=other)
    torch.compiler.reset()
    with torch.compiler.set_stance("force_eager"):
        assert_close(found, policy.live(*inputs(backbone), bank=other))


def test_another_number_of_banks_than_rows_is_an_error(backbone: Backbone) -> None:
    policy = make_policy(backbone, "tokens")
    with pytest.raises(ValueError, match="2 banks for 4 rows"):
        policy.live(*inputs(backbone), bank=("positive", "negative"))


def test_a_lora_gives_each_row_its_bank(each_backbone: Backbone) -> None:
    policy = make_policy(each_backbone, "lora")
    expected = policy.live(*inputs(each_backbone), bank=BANKS)
    with policy.adapters["lora"].using(BANKS):
        assert_close(each_backbone.predict(*inputs(each_backbone)), expected)
    with policy.using("negative"):
        alone = each_backbone.predict(*inputs(each_backbone))
    assert torch.equal(alone, policy.live(*inputs(each_backbone), bank="negative"))


def test_a_lora_on_text_encoders_cannot_be_asked_for_a_bank_per_row(backbone: Backbone) -> None:
    lora = LoRA(rank=2, banks=2, text_encoders=True)
    lora.attach(backbone)
    with pytest.raises(ValueError, match="cannot use one bank per row"), lora.using(BANKS):
        pass
