"""Predictions with a bank for each row: one pass where every adapter can mix them, and the same as bank by bank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.peft_layers import tuner_layers
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


def adapters_of(kept: str) -> dict[str, Any]:
    kinds = {
        "tokens": SoftTokens(),
        "lora": LoRA(rank=2, banks=2),
        "text": LoRA(rank=2, text_encoders=True),
        "guides": LoRA(rank=2, banks=2, guidance_bank="negative"),
    }
    return {"kept": kinds[kept], "other": LoRA(rank=2)}


@pytest.mark.parametrize("kept", ["tokens", "lora", "text", "guides"])
def test_a_kept_reference_stays_and_touches_nothing_else(backbone: Backbone, kept: str) -> None:
    policy, given = Policy(backbone, adapters_of(kept)), inputs(backbone)
    scatter(policy, "kept")
    with torch.no_grad():
        start, base = policy.live(*given), policy.base(*given)
    assert torch.equal(policy.reference(*given), base) and not torch.allclose(start, base, rtol=1e-3)
    policy.keep_reference(["kept"])
    scatter(policy, "kept", "other")
    policy.restart_ema()
    live, before = policy.live(*given), policy.state_dict()
    found = policy.reference(*given)
    assert torch.equal(found, start) and not torch.allclose(live, start, rtol=1e-3)
    with policy.ema_weights():
        assert torch.equal(policy.reference(*given), start)
    assert torch.equal(policy.base(*given), base)
    assert all(adapter.bank == "positive" for adapter in policy.adapters.values())
    for which in ("live", "ema"):
        assert all(torch.equal(policy.state_dict()[which][name], value) for name, value in before[which].items())
    expected = gradients(policy, policy.live(*given))
    assert all(torch.equal(one, two) for one, two in zip(gradients(policy, live), expected, strict=True))


def scatter(policy: Policy, *names: str) -> None:
    generator = torch.Generator().manual_seed(len(names))
    for parameter in policy.parameters(list(names)).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_a_kept_reference_is_in_the_state(backbone: Backbone) -> None:
    policy = make_policy(backbone)
    assert "reference" not in policy.state_dict()
    policy.keep_reference(["lora"])
    expected, state = policy.reference(*inputs(backbone)), policy.state_dict()
    scatter(policy, "lora")
    policy.keep_reference(["tokens"])
    policy.load_state_dict(state)
    assert torch.equal(policy.reference(*inputs(backbone)), expected)


def test_what_is_added_up_first_does_not_depend_on_what_was_switched(backbone: Backbone) -> None:
    policy = Policy(backbone, {"one": LoRA(rank=2, banks=2), "two": LoRA(rank=2, banks=2)})
    layers = [layer for _, layer in tuner_layers(backbone.denoiser)]
    at_first = [list(layer.active_adapters) for layer in layers]
    for names in (["one", "two"], ["two", "one"], ["one"], ["two"]):
        for name in names:
            with policy.adapters[name].using("negative"), policy.switched_off():
                policy.base(*inputs(backbone))
        policy.live(*inputs(backbone), bank=BANKS)
        assert [list(layer.active_adapters) for layer in layers] == at_first
    assert layers and all(len(active) == 2 for active in at_first)
