"""Prompts that come again are not encoded again, and get the numbers of an encoding."""

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.text_memory import TextMemory
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.policy import Policy
from agsm_rl.term import Term
from agsm_rl.trainer import Trainer

PROMPTS = ["a red star", "two blue circles of a kind", "green", "a ring"]


@pytest.fixture
def memory(backbone):
    """The backbone's memory, in use."""
    memory = TextMemory(backbone)
    with memory.in_use():
        yield memory


def counting(memory, monkeypatch) -> list[list[str]]:
    """The calls of the backbone's own `encode_text` from now on."""
    plain, asked = memory.plain, []
    monkeypatch.setattr(memory, "plain", lambda texts, **options: (asked.append(texts), plain(texts, **options))[1])
    return asked


def test_prompts_that_come_again_have_the_same_encoding_bit_for_bit(each_checkpoint):
    backbone = load_backbone(str(each_checkpoint), device="cpu")
    expected = backbone.encode_text(PROMPTS[::-1])
    with TextMemory(backbone).in_use():
        backbone.encode_text(PROMPTS)
        found = backbone.encode_text(PROMPTS[::-1])
    assert torch.equal(found.embeds, expected.embeds)
    assert found.prompts == expected.prompts
    assert (found.pooled is None) == (expected.pooled is None)
    assert found.pooled is None or torch.equal(found.pooled, expected.pooled)
    assert (found.mask is None) == (expected.mask is None)


def test_what_is_done_to_an_encoding_is_not_done_to_the_next(backbone, memory):
    before = backbone.encode_text(PROMPTS).embeds.clone()
    backbone.encode_text(PROMPTS).embeds.zero_()
    assert torch.equal(backbone.encode_text(PROMPTS).embeds, before)


def test_draws_and_what_is_learned_from_them_encode_each_prompt_once(
    backbone, memory, make_adapters, make_rollouts, monkeypatch
):
    policy, objective = Policy(backbone, make_adapters()), DDPO(steps_per_pass=2)
    backbone.encode_text(PROMPTS)  # so that it is known how texts are padded
    asked = counting(memory, monkeypatch)
    source = make_rollouts(bind=True, guidance=3.0, num_prompts=3)
    for _ in range(2):
        for part, _ in objective.split(batch := source.next(policy)):
            objective.loss(policy, part)
    texts = [text for call in asked for text in set(call)]
    assert sorted(texts) == sorted(set(texts))
    assert {*batch.prompts, ""} <= set(texts)


def test_the_oldest_are_forgotten_when_there_is_no_more_room(backbone, memory, monkeypatch):
    backbone.encode_text(PROMPTS)
    monkeypatch.setattr("agsm_rl.backbones.text_memory.IN_MEMORY", backbone.encode_text(PROMPTS[:1]).embeds.nbytes)
    backbone.encode_text(["a moon"])
    asked = counting(memory, monkeypatch)
    backbone.encode_text(["a moon"])
    assert asked == []
    backbone.encode_text(PROMPTS)
    assert asked == [PROMPTS]


def test_prompts_are_encoded_anew_while_an_adapter_changes_the_text_encoders(backbone, memory):
    policy = Policy(backbone, {"lora": LoRA(rank=2, text_encoders=True)})
    before = backbone.encode_text(PROMPTS).embeds
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.5)
    assert not torch.equal(backbone.encode_text(PROMPTS).embeds, before)


def test_a_trainer_has_a_memory_in_its_steps_only(make_policy, make_pairs):
    backbone = (policy := make_policy()).backbone
    trainer = Trainer(policy, [Term(AGSM(group_size=2), make_pairs())], steps=4)
    for _ in range(4):
        trainer.run_step()
    held = trainer._texts[0]._held
    before = backbone.encode_text(PROMPTS[:1]).embeds
    assert held
    assert all(prompt != PROMPTS[0] for prompt, *_ in held)
    with torch.no_grad():
        next(iter(backbone.text_encoders.values())).get_input_embeddings().weight.add_(0.5)
    assert not torch.equal(backbone.encode_text(PROMPTS[:1]).embeds, before)
