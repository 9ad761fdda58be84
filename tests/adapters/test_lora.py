"""LoRA through PEFT: banks, exactness when off, and files that diffusers itself loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.errors import UserError

PROMPTS = ["a red circle", "two blue squares"]


@torch.no_grad()
def predict(backbone: StableDiffusion) -> Tensor:
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    return backbone.predict(x_t, torch.tensor([0.1234, 0.9]), backbone.encode_text(PROMPTS))


def attached(backbone: StableDiffusion, *, seed: int = 0, **options: Any) -> LoRA:
    lora = LoRA(**options)
    lora.attach(backbone)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in lora.named_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return lora


def draw(pipeline: Any) -> Tensor:
    result = pipeline(
        PROMPTS, num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0), guidance_scale=5.0
    )
    return torch.as_tensor(result.images)


def anatomy(backbone: StableDiffusion) -> list[tuple[str, type, bool]]:
    return [(name, type(module), module.training) for name, module in backbone.denoiser.named_modules()]


def test_training_begins_at_the_base_model(backbone: StableDiffusion) -> None:
    before = predict(backbone)
    LoRA(banks=2).attach(backbone)
    assert torch.equal(predict(backbone), before)


def test_switched_off_the_base_is_exact_and_detached_nothing_is_left(backbone: StableDiffusion) -> None:
    before, modules, state = predict(backbone), anatomy(backbone), backbone.denoiser.state_dict()
    lora = attached(backbone, banks=2)
    assert not torch.equal(predict(backbone), before)
    with lora.using(None):
        assert torch.equal(predict(backbone), before)
    assert not torch.equal(predict(backbone), before)
    lora.detach()
    assert anatomy(backbone) == modules and backbone.adapters == []
    after = backbone.denoiser.state_dict()
    assert list(after) == list(state)
    assert all(after[name].data_ptr() == value.data_ptr() for name, value in state.items())
    assert torch.equal(predict(backbone), before)
    assert not hasattr(backbone.denoiser, "peft_config")
    assert not any(parameter.requires_grad for parameter in backbone.denoiser.parameters())


def test_it_can_be_attached_again(backbone: StableDiffusion) -> None:
    lora = attached(backbone)
    drawn = predict(backbone)
    lora.detach()
    attached(backbone)
    assert torch.equal(predict(backbone), drawn)


def test_two_banks_differ_and_one_bank_serves_under_both_names(backbone: StableDiffusion) -> None:
    lora = attached(backbone, banks=2)
    with lora.using("negative"):
        negative = predict(backbone)
    assert not torch.allclose(predict(backbone), negative)
    lora.detach()
    single = attached(backbone, banks=1)
    with single.using("negative"):
        negative = predict(backbone)
    assert torch.equal(predict(backbone), negative)


def test_the_parameters_of_all_banks_always_want_gradients(backbone: StableDiffusion) -> None:
    lora = attached(backbone, banks=2)
    for bank in ("negative", None, "positive"):
        with lora.using(bank):
            assert all(parameter.requires_grad for _, parameter in lora.named_parameters())
    ours = {parameter for _, parameter in lora.named_parameters()}
    assert {parameter for parameter in backbone.denoiser.parameters() if parameter.requires_grad} == ours


def test_only_the_bank_in_use_gets_gradients(backbone: StableDiffusion) -> None:
    lora = attached(backbone, banks=2)
    x_t = torch.ones(1, 4, 8, 8)
    with lora.using("negative"):
        loss = backbone.predict(x_t, torch.tensor([0.5]), backbone.encode_text([""])).square().mean()
    names, parameters = zip(*lora.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        assert (gradient is not None) == name.startswith("negative."), name


def test_names_and_initial_values_are_the_same_in_every_run(backbone: StableDiffusion) -> None:
    def initial(seed: int) -> dict[str, Tensor]:
        lora = LoRA(rank=2, banks=2, seed=seed)
        torch.rand(seed + 3)  # the global generator has no say
        lora.attach(backbone)
        values = {name: parameter.detach().clone() for name, parameter in lora.named_parameters()}
        lora.detach()
        return values

    state = torch.get_rng_state()
    first = initial(0)
    torch.set_rng_state(state)
    torch.rand(3)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    second = initial(0)
    assert torch.equal(torch.get_rng_state(), expected)  # and it is left as it was found
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    name = "positive.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A"
    assert first[name].shape == (2, 64) and not torch.equal(first[name], initial(1)[name])


def test_it_stays_float32_on_a_bfloat16_base(tiny_checkpoint: Path) -> None:
    backbone = StableDiffusion(str(tiny_checkpoint), dtype="bfloat16", device="cpu")
    lora = attached(backbone)
    assert {parameter.dtype for _, parameter in lora.named_parameters()} == {torch.float32}
    assert predict(backbone).isfinite().all()


def test_soft_tokens_and_lora_work_together_and_come_off_in_any_order(backbone: StableDiffusion) -> None:
    before, modules = predict(backbone), anatomy(backbone)
    tokens, lora = SoftTokens(), attached(backbone)
    only_lora = predict(backbone)
    tokens.attach(backbone)
    dict(tokens.named_parameters())["soft_tokens"].data += 1
    both = predict(backbone)
    assert not torch.equal(both, only_lora)
    with lora.using(None):
        only_tokens = predict(backbone)
        with tokens.using(None):
            assert torch.equal(predict(backbone), before)
    assert not torch.equal(only_tokens, both)
    lora.detach()
    assert torch.equal(predict(backbone), only_tokens)
    tokens.detach()
    assert torch.equal(predict(backbone), before) and anatomy(backbone) == modules


def test_two_loras_add_up_and_are_switched_apart(backbone: StableDiffusion) -> None:
    before, modules = predict(backbone), anatomy(backbone)
    first = attached(backbone, rank=2)
    alone = predict(backbone)
    second = attached(backbone, rank=4, seed=1, target_modules=("to_k", "proj_in"))
    assert not torch.allclose(predict(backbone), alone)
    with second.using(None):
        assert torch.equal(predict(backbone), alone)
        with first.using(None):
            assert torch.equal(predict(backbone), before)
    assert all(p.requires_grad for lora in (first, second) for _, p in lora.named_parameters())
    second.detach()
    assert torch.equal(predict(backbone), alone)
    first.detach()
    assert torch.equal(predict(backbone), before) and anatomy(backbone) == modules


@pytest.mark.parametrize("banks", [1, 2])
@pytest.mark.parametrize("alpha", [None, 6])
def test_an_export_loads_into_diffusers_and_draws_the_same_image(
    backbone: StableDiffusion, tiny_checkpoint: Path, tmp_path: Path, banks: int, alpha: int | None
) -> None:
    base = draw(backbone.pipeline)
    lora = attached(backbone, rank=2, alpha=alpha, banks=banks)
    drawn = draw(backbone.pipeline)
    tensors, metadata = lora.export()
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata)
    plain = StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)
    plain.load_lora_weights(tmp_path)
    assert torch.equal(draw(plain), drawn) and not torch.equal(base, drawn)
    assert {name for module in plain.unet.modules() if isinstance(module, BaseTunerLayer) for name in module.r} == {
        "default_0"
    }


def test_an_export_is_taken_back_with_both_banks(backbone: StableDiffusion) -> None:
    lora = attached(backbone, rank=2, alpha=5, banks=2)
    tensors, metadata = lora.export()
    before = dict(lora.named_parameters())
    lora.detach()
    again = LoRA.from_export(tensors, metadata)
    assert (again.rank, again.alpha, again.banks) == (2, 5, 2)
    again.attach(backbone)
    again.load_export(tensors, metadata)
    after = dict(again.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_export_that_does_not_fit_is_refused(backbone: StableDiffusion) -> None:
    lora = attached(backbone, rank=2)
    tensors, metadata = lora.export()
    first = next(iter(tensors))
    with pytest.raises(UserError, match="another rank or base"):
        lora.load_export({**tensors, first: torch.zeros(3, 32)}, metadata)
    with pytest.raises(UserError, match=f"this base has no 'unet.other.{'lora_A'}"):
        lora.load_export({**tensors, "unet.other.lora_A.weight": torch.zeros(2, 2)}, metadata)
    with pytest.raises(UserError, match="the file has no"):
        lora.load_export({name: value for name, value in tensors.items() if name != first}, metadata)
    other = LoRA(rank=2, alpha=16)
    lora.detach()
    other.attach(backbone)
    with pytest.raises(
        UserError, match=r"alpha is 2 in the file, 16 here: .* at 8 times their strength. Set `alpha: 2`"
    ):
        other.load_export(tensors, metadata)
    with pytest.raises(UserError, match="metadata .lora_adapter_metadata. is missing"):
        LoRA.from_export(tensors, {})


def test_target_modules_that_match_nothing_are_named(backbone: StableDiffusion) -> None:
    with pytest.raises(UserError, match="is called to_quarry"):
        LoRA(target_modules=("to_quarry",)).attach(backbone)
    assert not hasattr(backbone.denoiser, "peft_config")


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="rank: 0"):
        LoRA(rank=0)
    with pytest.raises(UserError, match="rank: 1000000000000000000; allowed: 1 to 4096"):
        LoRA(rank=10**18)
    for alpha in (0.0, -1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(UserError, match="lora.alpha is .*; it must be a finite number above 0"):
            LoRA(alpha=alpha)
    with pytest.raises(UserError, match="banks: 0"):
        LoRA(banks=0)


def test_an_export_whose_description_was_changed_is_refused(backbone: StableDiffusion) -> None:
    tensors, metadata = attached(backbone, rank=2).export()
    options = json.loads(metadata["lora_adapter_metadata"])
    for changes, message in (
        ({"unet.lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"unet.r": 4}, r"rank of the file's tensors is 2, of its metadata \[4\]"),
        ({"unet.use_dora": True}, "use_dora is True"),
        ({"unet.target_modules": "(a+)+"}, "it must be a list of module names"),
        ({"unet.alpha_pattern": {"to_q|to_k": 7}}, "regular expressions are not"),
        ({"transformer.r": 2, "transformer.target_modules": ["to_q"], "transformer.lora_alpha": 2}, "one denoiser"),
    ):
        with pytest.raises(UserError, match=message):
            LoRA.from_export(tensors, metadata | {"lora_adapter_metadata": json.dumps(options | changes)})
