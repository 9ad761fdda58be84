"""The gradient map: it takes gradients apart exactly, names blocks for people, and changes nothing of the training."""

import json

import pytest
import torch

from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.diffusion_nft import DiffusionNFT
from agsm_rl.objectives.score_matching import ScoreMatching
from agsm_rl.recipe import Recipe
from agsm_rl.run import train
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.gradient_map import GradientMap, Learned, block_of
from agsm_rl.training.row_shares import RowShare

MAKERS = {"agsm": lambda: AGSM(group_size=2), "ddpo": DDPO, "nft": DiffusionNFT, "plain": ScoreMatching}


@pytest.mark.parametrize("name", MAKERS)
def test_the_levels_gradients_add_up_to_the_step_s(name, make_policy, make_pairs, make_rollouts):
    source = make_rollouts() if name in ("ddpo", "nft") else make_pairs()
    term = Term(MAKERS[name](), source, name=name)
    trainer = Trainer(make_policy(), [term], steps=1)
    batch = term.source.next(trainer.policy)
    whole, _ = trainer._learn(term, batch, RowShare(len(batch)))
    parts = GradientMap(1, levels=4)._by_level(trainer, Learned(term, batch, RowShare(len(batch))))
    reached = sum(any(value.abs().sum() > 0 for value in part.values()) for part in parts)
    assert reached == 1 if name == "agsm" else reached > 1  # AGSM draws one noise level for a step
    for key, value in whole.items():
        torch.testing.assert_close(sum(part[key] for part in parts), value, rtol=1e-4, atol=1e-7)


def test_a_term_is_left_out_whose_predictions_follow_from_one_another(make_policy, make_pairs):
    class AlongAPath(ScoreMatching):
        def loss(self, policy, batch):
            noised = policy.noised(batch)
            first = policy.live(noised.x_t, noised.t, noised.cond)
            return policy.live(noised.x_t - 0.1 * first, noised.t, noised.cond).square().mean(), {}

    terms = [Term(AlongAPath(), make_pairs(), name="path"), Term(ScoreMatching(), make_pairs(), name="plain")]
    trainer = Trainer(make_policy(), terms, steps=1, gradient_map=GradientMap(1))
    trainer.run_step()
    assert trainer.gradient_map.newest["left_out"] == ["path"] and trainer.gradient_map.newest["cosines"] == {}


def test_a_term_whose_rollouts_kept_their_graph_is_taken_apart_too(make_policy, make_rollouts):
    source = make_rollouts(keep_graph=True)
    term = Term(DDPO(), source, name="ddpo")
    trainer = Trainer(make_policy(), [term, Term(DiffusionNFT(), source, name="nft")], steps=1)
    batch = source.next(trainer.policy)
    whole, _ = trainer._learn(term, batch, RowShare(len(batch)))
    parts = GradientMap(1, levels=4)._by_level(trainer, Learned(term, batch, RowShare(len(batch))))
    for key, value in whole.items():
        torch.testing.assert_close(sum(part[key] for part in parts), value, rtol=1e-4, atol=1e-7)


def test_looking_changes_nothing_of_the_training(make_policy, make_pairs):
    def run(gradient_map):
        pairs = make_pairs()
        terms = [Term(ScoreMatching(), pairs, name="one"), Term(ScoreMatching(), pairs, name="two", weight=0.5)]
        trainer = Trainer(make_policy(), terms, steps=3, gradient_map=gradient_map)
        looks = []
        for _ in range(3):
            trainer.run_step()
            looks.append(gradient_map and gradient_map.newest)
        return trainer.policy.parameters(), looks

    plain, _ = run(None)
    looked, looks = run(GradientMap(2, levels=2))
    assert all(torch.equal(plain[name], looked[name]) for name in plain)
    assert looks[1] is None and looks[0]["edges"] == [0.0, 0.5, 1.0] and looks[2]["left_out"] == []
    assert {len(row) for row in looks[0]["cosines"]["one/two"]} == {len(looks[0]["blocks"])}
    assert any(block.startswith("lora: down_blocks") for block in looks[0]["blocks"])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora.positive.down_blocks.0.attentions.0.transformer_blocks.1.attn2.to_q.lora_A", "lora: down_blocks.0"),
        ("lora.negative.mid_block.attentions.0.attn2.to_q.lora_A", "lora: mid_block"),
        ("mine.transformer_blocks.11.attn.to_q.lora_B", "mine: transformer_blocks.11"),
        ("lora.positive.single_transformer_blocks.3.attn.to_q.lora_B", "lora: single_transformer_blocks.3"),
        ("lora.positive.layers.7.attention.to_k.lora_A", "lora: layers.7"),
        ("lora.positive.text_encoder_2.text_model.encoder.layers.3.q_proj.lora_A", "lora: text_encoder_2"),
        ("tokens.soft_tokens", "tokens: soft_tokens"),
    ],
)
def test_a_parameter_belongs_to_its_adapter_s_block(name, block):
    assert block_of(name) == block


def test_a_run_writes_a_line_for_each_look(tiny_checkpoint, tmp_path):
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2, "num_images": 8}
    recipe = Recipe.from_data(
        {
            "steps": 3,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": [
                {"use": "score_matching", "source": pairs},
                {"use": "agsm", "group_size": 2, "source": pairs},
            ],
            "gradient_map": {"every": 2, "levels": 2},
            "sample": {"num_images": 1, "num_steps": 1},
            "track": [],
        }
    )
    folder = train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "gradient_map.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert list(lines[0]["cosines"]) == ["score_matching/agsm"]
