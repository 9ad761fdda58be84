"""The three forms of guidance's unconditional branch, wherever pictures are drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw
from agsm_rl.export.attach import attach, read_export, save_adapters
from agsm_rl.interfaces import Backbone, Cond
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.training.guidance import guiding
from agsm_rl.training.sampling import guided

PROMPTS = ["a red circle", "two blue squares"]
FORMS = [("positive", "empty"), ("negative", "empty"), ("negative", "same")]


def attached(backbone: Backbone, kind: str = "tokens", **options: Any) -> Any:
    adapter = SoftTokens(num_tokens=2, **options) if kind == "tokens" else LoRA(rank=2, banks=2, **options)
    adapter.attach(backbone)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in adapter.named_parameters():
        parameter.data += (1.0 if kind == "tokens" else 0.15) * torch.randn(parameter.shape, generator=generator)
    return adapter


def drawn(backbone: Backbone, guidance: float = 3.0) -> Tensor:
    return draw(backbone, PROMPTS, [0, 1], guidance=guidance, num_steps=2)


def first_call(backbone: Backbone, guidance: float) -> tuple[Tensor, Tensor]:
    """Latents into and prediction out of the denoiser's first call while pictures are drawn."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        calls.append((latents.clone(), result[0].clone()))

    hook = backbone.denoiser.register_forward_hook(note, with_kwargs=True)
    try:
        draw(backbone, PROMPTS, [0, 1], guidance=guidance, num_steps=2)
    finally:
        hook.remove()
    return calls[0]


@pytest.mark.parametrize("kind", ["tokens", "lora"])
@pytest.mark.parametrize(("bank", "prompt"), FORMS)
def test_each_branch_sees_its_bank_and_its_prompt(each_backbone: Backbone, bank: Any, prompt: Any, kind: str) -> None:
    tokens = attached(each_backbone, kind, guidance_bank=bank, guidance_prompt=prompt)
    latents, prediction = first_call(each_backbone, 3.0)
    t = (each_backbone.pipeline.scheduler.timesteps[0] / 1000).float().expand(2)
    cond = each_backbone.encode_text(PROMPTS)
    uncond: Cond = cond if prompt == "same" else each_backbone.encode_text([""]).expand(2)
    with torch.no_grad():
        with tokens.using(bank):
            without = each_backbone.predict(latents[:2], t, uncond)
        with tokens.using("positive"):
            with_prompt = each_backbone.predict(latents[2:], t, cond)
        with tokens.using(None):
            base = each_backbone.predict(latents[2:], t, cond)
    torch.testing.assert_close(prediction, torch.cat([without, with_prompt]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(with_prompt, base, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "bank", "prompt"), [("tokens", *FORMS[1]), ("tokens", *FORMS[2]), ("lora", *FORMS[1])]
)
def test_an_exported_form_draws_the_same_on_a_plain_pipeline(
    each_checkpoint: Path, tmp_path: Path, kind: str, bank: Any, prompt: Any
) -> None:
    ours, plain = (load_backbone(str(each_checkpoint), device="cpu") for _ in range(2))
    tokens = attached(ours, kind, guidance_bank=bank, guidance_prompt=prompt)
    save_adapters({"tokens": tokens}, tmp_path, metadata={})
    base = drawn(plain)
    handle = attach(plain.pipeline, tmp_path)
    assert torch.equal(drawn(plain), drawn(ours))
    handle.detach()
    assert torch.equal(drawn(plain), base)


def test_the_file_names_the_form_and_attach_may_overrule_it(
    backbone: Backbone, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tokens = attached(backbone, guidance_bank="negative")
    save_adapters({"tokens": tokens}, tmp_path, metadata={})
    _, metadata = read_export(tmp_path / "tokens.safetensors")
    assert (metadata["guidance_bank"], metadata["guidance_prompt"]) == ("negative", "empty")
    plain = load_backbone(str(tiny_checkpoint), device="cpu")
    attach(plain.pipeline, tmp_path, guidance_bank="positive")
    with guiding([tokens], "positive", None):
        expected = drawn(backbone)
    assert torch.equal(drawn(plain), expected) and not torch.equal(expected, drawn(backbone))


def test_without_guidance_and_while_off_the_form_changes_nothing(backbone: Backbone) -> None:
    base = drawn(backbone)
    tokens = attached(backbone, guidance_bank="negative", guidance_prompt="same")
    with tokens.using(None):
        assert torch.equal(drawn(backbone), base)
    unguided = drawn(backbone, guidance=1.0)
    with guiding([tokens], "positive", "empty"):
        assert torch.equal(drawn(backbone, guidance=1.0), unguided)


def test_the_negative_bank_alone_overrules_the_form(backbone: Backbone) -> None:
    tokens = attached(backbone, guidance_bank="negative", guidance_prompt="same")
    with tokens.using("negative"):
        both_negative = drawn(backbone)
    with guiding([tokens], "positive", "empty"), tokens.using("negative"):
        assert torch.equal(drawn(backbone), both_negative)


def test_predictions_in_training_are_not_guided_after_a_picture_was_drawn(backbone: Backbone) -> None:
    attached(backbone, guidance_bank="negative")
    x_t, t, cond = torch.ones(2, *backbone.latent_shape), torch.full((2,), 0.5), backbone.encode_text(PROMPTS)
    before = backbone.predict(x_t, t, cond)
    drawn(backbone)
    assert torch.equal(backbone.predict(x_t, t, cond), before)


def test_forms_that_cannot_be_are_refused(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="only one bank"):
        SoftTokens(banks=1, guidance_bank="negative")
    with pytest.raises(UserError, match="lora.guidance_bank: negative, but there is only one bank"):
        LoRA(guidance_bank="negative")
    with pytest.raises(UserError, match="this adapter changes the text encoders too"):
        LoRA(banks=2, text_encoders=True, guidance_bank="negative")
    with pytest.raises(UserError, match="both branches would be the same"):
        SoftTokens(guidance_prompt="same")
    with pytest.raises(UserError, match="Did you mean 'negative'"):
        SoftTokens(guidance_bank="negativ")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no adapter here can guide so"), guiding([], "negative", None):
        pass


@pytest.mark.parametrize(("bank", "prompt"), FORMS)
def test_a_policy_guides_its_rollouts_in_the_same_form(each_backbone: Backbone, bank: Any, prompt: Any) -> None:
    tokens = SoftTokens(num_tokens=2, init="normal", guidance_bank=bank, guidance_prompt=prompt)
    policy = Policy(each_backbone, {"tokens": tokens})
    x_t = torch.randn(2, *each_backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond, uncond = torch.full((2,), 0.5), each_backbone.encode_text(PROMPTS), each_backbone.encode_text([""])
    with torch.no_grad():
        together = guided(policy.live, x_t, t, cond, uncond, 3.0)
        other = cond if prompt == "same" else uncond.expand(2)
        without, with_prompt = policy.live(x_t, t, other, bank=bank), policy.live(x_t, t, cond)
        off, base = policy.reference(x_t, t, cond), guided(policy.reference, x_t, t, cond, uncond, 3.0)
        torch.testing.assert_close(together, without + 3 * (with_prompt - without), rtol=1e-4, atol=1e-5)
        plain = policy.reference(x_t, t, uncond.expand(2))
        torch.testing.assert_close(base, plain + 3 * (off - plain), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(with_prompt, off)


def test_a_form_that_is_asked_for_is_that_of_all_adapters_with_two_banks() -> None:
    tokens, lora, alone = SoftTokens(), LoRA(banks=2), LoRA()
    with guiding([tokens, lora, alone], "negative", "same"):
        assert [each.guidance_bank for each in (tokens, lora, alone)] == ["negative", "negative", "positive"]
    assert tokens.guidance_bank == lora.guidance_bank == "positive"
    with pytest.raises(UserError, match="there is only one bank"), guiding([alone], "negative", None):
        pass


def test_rollouts_draw_and_learn_in_their_own_form(policy: Policy, make_rollouts: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    batch, plain = (
        make_rollouts(bind=True, guidance=3.0, guidance_bank=bank).next(policy) for bank in ("negative", None)
    )
    assert not torch.equal(batch.latents, plain.latents)
    assert policy.adapters["tokens"].guidance_bank == "positive"
    for part, _ in DDPO().split(batch):
        assert DDPO().loss(policy, part)[1]["ratio_deviation"] < 1e-5


def test_a_recipe_whose_grids_or_rollouts_ask_for_a_bank_that_is_not_there_is_refused() -> None:
    source = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"shapes": 1.0}}
    content = {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
        "adapters": {"lora": {"use": "lora"}},
        "objectives": [{"use": "ddpo", "source": source}],
    }
    with pytest.raises(UserError, match=r"sample\.guidance_bank: negative, but there is only one bank"):
        Recipe.from_data(content | {"sample": {"guidance_bank": "negative"}})
    source["guidance_bank"] = "negative"
    with pytest.raises(
        UserError, match=r"objectives\[0\]\.source\.guidance_bank: negative, but there is only one bank"
    ):
        Recipe.from_data(content)
