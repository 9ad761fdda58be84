"""LoRA on the text encoders: each prediction encodes its prompts under the bank in use, and nobody else pays for it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from torch import Tensor, nn

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.checkpointing import enable_gradient_checkpointing
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach, read_export, save_adapters
from agsm_rl.interfaces import Adapter, Backbone, Cond
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.policy import Policy
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.sampling import guided

PROMPTS = ["a red circle", "two blue squares"]


def text_lora(**options: Any) -> LoRA:
    return LoRA(**({"rank": 2, "banks": 2, "text_encoders": True} | options))


def disturb(adapter: Adapter, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.named_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def policy_on(backbone: Backbone, *, tokens: bool = True, ema_decay: float = 0.5) -> Policy:
    """Trained, as it were: no parameter is at its beginning, and the EMA lags behind."""
    adapters: dict[str, Adapter] = {"lora": text_lora()} | ({"tokens": SoftTokens(num_tokens=2)} if tokens else {})
    policy = Policy(backbone, adapters, ema_decay=ema_decay)
    for adapter in adapters.values():
        disturb(adapter)
    policy.update_ema(1)
    return policy


def point(backbone: Backbone) -> tuple[Tensor, Tensor]:
    x_t = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(7))
    return x_t, torch.tensor([0.1234, 0.9])


def anatomy(backbone: Backbone) -> list[Any]:
    found: list[Any] = []
    for model in (backbone.denoiser, *backbone.text_encoders.values()):
        found += [(name, type(module), module.training) for name, module in model.named_modules()]
        found += [(name, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]
        found += [hasattr(model, "peft_config"), len(model._forward_hooks), len(model._forward_pre_hooks)]
    return found


@contextmanager
def counted(backbone: Any) -> Iterator[list[list[str]]]:
    """The prompts of each call of `encode_text` within the block."""
    calls: list[list[str]] = []
    encode = backbone.encode_text

    def count(prompts: list[str], **options: Any) -> Cond:
        calls.append(prompts)
        return encode(prompts, **options)

    backbone.encode_text = count
    yield calls
    del backbone.encode_text


def draw(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(PROMPTS, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt")
    return torch.as_tensor(drawn.images)


def test_a_cond_s_rows_keep_their_prompts() -> None:
    cond = Cond(torch.arange(3.0)[:, None, None], prompts=("a", "b", "c"))
    assert cond[torch.tensor([2, 0, 2])].prompts == ("c", "a", "c")
    assert cond[torch.tensor([False, True, True])].prompts == ("b", "c")
    assert cond[1:].prompts == ("b", "c") and cond[[1]].expand(3).prompts == ("b",) * 3
    assert Cond.cat([cond[:1].expand(2), cond]).prompts == ("a", "a", "a", "b", "c")
    bare = Cond(torch.zeros(2, 1, 1))
    assert bare[[0]].prompts == bare[:1].expand(2).prompts == Cond.cat([cond, bare]).prompts == ()


def test_switched_off_or_detached_the_base_is_exact_text_encoders_included(each_backbone: Backbone) -> None:
    bare, parts = each_backbone.encode_text(PROMPTS), anatomy(each_backbone)
    with torch.no_grad():
        before = each_backbone.predict(*point(each_backbone), bare)
    policy = policy_on(each_backbone)
    changed = each_backbone.encode_text(PROMPTS)
    assert not torch.allclose(changed.embeds, bare.embeds)
    assert bare.pooled is None or not torch.allclose(changed.pooled, bare.pooled)
    assert torch.equal(policy.reference(*point(each_backbone), changed), before)
    with policy.switched_off():
        assert torch.equal(each_backbone.encode_text(PROMPTS).embeds, bare.embeds)
    assert anatomy(each_backbone) != parts
    for adapter in policy.adapters.values():
        adapter.detach()
    assert anatomy(each_backbone) == parts and each_backbone.adapters == []
    assert torch.equal(each_backbone.encode_text(PROMPTS).embeds, bare.embeds)


def test_each_prediction_encodes_the_prompts_under_its_own_bank_and_weights(each_backbone: Backbone) -> None:
    policy = policy_on(each_backbone)
    given = each_backbone.encode_text(PROMPTS)
    found = {}
    with torch.no_grad():
        for bank in ("positive", "negative"):
            with policy.using(bank):
                wanted = each_backbone.predict(*point(each_backbone), each_backbone.encode_text(PROMPTS))
            found[bank] = policy.live(*point(each_backbone), given, bank=bank)
            torch.testing.assert_close(found[bank], wanted)
        with policy.ema_weights():
            wanted = each_backbone.predict(*point(each_backbone), each_backbone.encode_text(PROMPTS))
        ema = policy.ema(*point(each_backbone), given)
    torch.testing.assert_close(ema, wanted)
    assert not torch.allclose(found["positive"], found["negative"]) and not torch.allclose(ema, found["positive"])


def test_only_an_adapter_of_the_text_makes_a_policy_encode_again(backbone: StableDiffusion) -> None:
    policy = Policy(backbone, {"tokens": SoftTokens(), "lora": LoRA(banks=2)})
    cond = backbone.encode_text(PROMPTS)
    with counted(backbone) as calls:
        policy.live(*point(backbone), cond)
        policy.ema(*point(backbone), cond, bank="negative")
        policy.reference(*point(backbone), cond)
    assert calls == []
    for adapter in policy.adapters.values():
        adapter.detach()
    policy = policy_on(backbone)
    with counted(backbone) as calls:
        policy.live(*point(backbone), cond)
        policy.ema(*point(backbone), cond, bank="negative")
        policy.reference(*point(backbone), cond[[1, 1]])
    assert calls == [PROMPTS, PROMPTS, [PROMPTS[1]] * 2]
    with pytest.raises(ValueError, match="without its prompts"):
        policy.live(*point(backbone), Cond(cond.embeds))


@pytest.mark.parametrize("bank", ["positive", "negative"])
def test_gradients_reach_every_text_encoder_s_own_bank_and_checkpointing_changes_none(
    each_backbone: Backbone, bank: Any
) -> None:
    policy = policy_on(each_backbone)
    parameters = policy.parameters(["lora"])

    def gradients() -> dict[str, Tensor]:
        # SDXL's empty prompt is zeros, whatever its text encoders say.
        cond = each_backbone.encode_text(["", PROMPTS[1]])
        loss = policy.live(*point(each_backbone), cond, bank=bank).square().mean()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {name: value for name, value in zip(parameters, found, strict=True) if value is not None}

    plain = gradients()
    assert all(name.startswith(f"lora.{bank}.") for name in plain)
    for name in each_backbone.text_encoders:
        own = [key for key in parameters if key.startswith(f"lora.{bank}.{name}.")]
        assert all(key in plain and plain[key].isfinite().all() for key in own)
        assert sum(plain[key].abs().sum() for key in own) > 0
    enable_gradient_checkpointing(each_backbone.denoiser, each_backbone.adapters, nullcontext)
    again = gradients()
    assert again.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-8)


def test_layers_that_have_no_say_in_the_text_are_left_out(each_backbone: Backbone) -> None:
    """Of two layers: the last of SDXL's first CLIP, whose last but one state is taken and whose pooled one is not."""
    lora = text_lora()
    lora.attach(each_backbone)
    found = {name.split(".self_attn")[0] for name, _ in lora.named_parameters() if ".self_attn." in name}
    wanted = {
        f"{bank}.{encoder}.text_model.encoder.layers.{layer}"
        for bank in ("positive", "negative")
        for encoder in each_backbone.text_encoders
        for layer in (0, 1)
    }
    if each_backbone.name == "stable_diffusion_xl":
        wanted -= {f"{bank}.text_encoder.text_model.encoder.layers.1" for bank in ("positive", "negative")}
    assert found == wanted
    for model in each_backbone.text_encoders.values():  # transformers' own hooks sit elsewhere
        assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Linear))


def test_soft_tokens_beside_it_begin_at_the_base_s_bos(backbone: StableDiffusion) -> None:
    begin = backbone.encode_text([" "]).embeds[0, 0]
    lora = text_lora()
    lora.attach(backbone)
    disturb(lora)
    assert not torch.equal(backbone.encode_text([" "]).embeds[0, 0], begin)
    tokens = SoftTokens()
    tokens.attach(backbone)
    rows = dict(tokens.named_parameters())["soft_tokens"]
    assert torch.equal(rows, begin.expand_as(rows)) and lora.bank == "positive"


def test_both_branches_of_guidance_in_one_batch_are_what_they_are_alone(each_backbone: Backbone) -> None:
    policy = policy_on(each_backbone)
    x_t, t = point(each_backbone)
    cond, uncond = each_backbone.encode_text(PROMPTS), each_backbone.encode_text([""])
    with torch.no_grad():
        together = guided(policy.live, x_t, t, cond, uncond, 3.0)
        without, with_prompt = policy.live(x_t, t, uncond.expand(2)), policy.live(x_t, t, cond)
    torch.testing.assert_close(together, without + 3.0 * (with_prompt - without), rtol=1e-4, atol=1e-4)


def test_fresh_rollouts_have_ratio_one(each_backbone: Backbone, make_rollouts) -> None:
    policy = policy_on(each_backbone)
    _, metrics = DDPO().loss(policy, make_rollouts(bind=True, guidance=3.0).next(policy))
    assert metrics["ratio_deviation"].item() < 1e-5


def test_a_stack_of_agsm_and_ddpo_trains_the_text_of_both_banks(
    backbone: StableDiffusion, make_pairs, make_rollouts
) -> None:
    policy = Policy(backbone, {"lora": text_lora()})
    before = {name: value.detach().clone() for name, value in policy.parameters().items()}
    Trainer(
        policy, [Term(AGSM(), make_pairs(), name="agsm"), Term(DDPO(), make_rollouts(), name="ddpo")], steps=1
    ).train()
    moved = {name for name, value in policy.parameters().items() if not torch.equal(value, before[name])}
    for bank in ("positive", "negative"):
        assert any(name.startswith(f"lora.{bank}.text_encoder.") and name.endswith("lora_B") for name in moved)


def test_an_export_draws_the_same_through_attach_and_through_diffusers(
    each_backbone: Backbone, each_checkpoint: Path, tmp_path: Path
) -> None:
    policy = policy_on(each_backbone)
    (lora, tokens) = save_adapters(policy.adapters, tmp_path, metadata={})
    plain = AutoPipelineForText2Image.from_pretrained(each_checkpoint)
    unchanged = draw(plain)
    handle = attach(plain, tmp_path)
    assert torch.equal(draw(plain), draw(each_backbone.pipeline))
    handle.detach()
    assert torch.equal(draw(plain), unchanged)
    assert not any(hasattr(part, "peft_config") for part in plain.components.values() if isinstance(part, nn.Module))
    policy.adapters["tokens"].detach()
    wanted = draw(each_backbone.pipeline)
    plain.load_lora_weights(lora)
    torch.testing.assert_close(draw(plain), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, unchanged, atol=1e-3)
    for name in each_backbone.text_encoders:  # diffusers has put it there too
        assert "default_0" in getattr(plain, name).peft_config
    assert tokens.name == "tokens.safetensors"


def test_an_export_is_taken_back_with_both_banks_under_names_of_every_transformers(
    each_backbone: Backbone, tmp_path: Path
) -> None:
    lora = text_lora(alpha=5)
    lora.attach(each_backbone)
    disturb(lora)
    (file,) = save_adapters({"lora": lora}, tmp_path, metadata={})
    tensors, metadata = read_export(file)
    names = {name.removeprefix("negative.").partition(".")[0] for name in tensors}
    assert names == {*each_backbone.text_encoders} | names & {"unet", "transformer"}
    for name in each_backbone.text_encoders:
        assert f"{name}.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    before = {name: value.detach().clone() for name, value in lora.named_parameters()}
    lora.detach()
    again = LoRA.from_export(tensors, metadata)
    again.attach(each_backbone)
    again.load_export(tensors, metadata)
    after = dict(again.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert (again.rank, again.alpha, again.banks, again.changes_text) == (2, 5, 2, True)


def test_it_shares_layers_with_another_lora_and_each_comes_off_alone(backbone: StableDiffusion) -> None:
    parts, bare = anatomy(backbone), backbone.encode_text(PROMPTS).embeds
    first, second = text_lora(), text_lora(rank=3, seed=1)
    for lora in (first, second):
        lora.attach(backbone)
        disturb(lora)
    both = backbone.encode_text(PROMPTS).embeds
    with second.using(None):
        alone = backbone.encode_text(PROMPTS).embeds
        assert not torch.allclose(alone, both)
        with first.using(None):
            assert torch.equal(backbone.encode_text(PROMPTS).embeds, bare)
    second.detach()
    assert torch.equal(backbone.encode_text(PROMPTS).embeds, alone)
    first.detach()
    assert anatomy(backbone) == parts


def test_it_can_go_from_one_kind_of_base_to_another(tiny_xl_checkpoint: Path, backbone: StableDiffusion) -> None:
    lora = text_lora()
    lora.attach(load_backbone(str(tiny_xl_checkpoint), device="cpu"))
    assert any(".text_encoder_2." in name for name, _ in lora.named_parameters())
    lora.detach()
    lora.attach(backbone)
    assert not any(".text_encoder_2." in name for name, _ in lora.named_parameters())


def test_a_base_without_such_a_text_encoder_says_what_it_has(
    xl_backbone: StableDiffusion, backbone: StableDiffusion
) -> None:
    lora = text_lora()
    lora.attach(xl_backbone)
    exported = LoRA.from_export(*lora.export())
    with pytest.raises(UserError, match=r"got text_encoder, text_encoder_2; .* take a LoRA: text_encoder\."):
        exported.attach(backbone)
    backbone.text_encoders = {}
    with pytest.raises(UserError, match="got true; .* take a LoRA: none"):
        text_lora().attach(backbone)
    assert backbone.adapters == [] and not hasattr(backbone.denoiser, "peft_config")


def test_the_text_stays_float32_trained_on_a_bfloat16_base(tiny_checkpoint: Path) -> None:
    policy = policy_on(StableDiffusion(str(tiny_checkpoint), dtype="bfloat16", device="cpu"))
    backbone = policy.backbone
    loss = policy.live(*point(backbone), backbone.encode_text(PROMPTS)).square().mean()
    parameters = {name: value for name, value in policy.parameters(["lora"]).items() if ".positive." in name}
    found = torch.autograd.grad(loss, list(parameters.values()))
    assert {value.dtype for value in found} == {torch.float32} and all(value.isfinite().all() for value in found)


def test_a_recipe_asks_for_it_by_one_option(tiny_checkpoint: Path) -> None:
    source = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 8}
    recipe = Recipe.from_data(
        {
            "steps": 1,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2, "text_encoders": True}},
            "objectives": [{"use": "score_matching", "source": source}],
            "track": [],
        }
    )
    trainer = build_trainer(recipe)
    trainer.train()
    found = trainer.policy.parameters()
    assert any(value.any() for name, value in found.items() if ".text_encoder." in name and name.endswith("lora_B"))
