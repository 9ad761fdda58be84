"""Reward backpropagation through native rewards, from a recipe: gradients reach the adapters, and the score rises."""

import pytest
import torch
from tiny_rewards import TINY

from agsm_rl import registry
from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch
from agsm_rl.objectives.reward_backprop import RewardBackprop
from agsm_rl.policy import Policy
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.sources.prompts import Prompts
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.randomness import Draw


@pytest.fixture
def recipe_data(tiny_checkpoint, tmp_path, tiny_options):
    (tmp_path / "prompts.txt").write_text("a red star\n")

    def make(name, *, weight=1.0, **options):
        source = {"use": "prompts", "prompts": str(tmp_path / "prompts.txt"), "batch_size": 2}
        rewards = {name: {"weight": weight, **tiny_options[name], **options}}
        term = {"use": "reward_backprop", "rewards": rewards, "source": source}
        return {
            "steps": 1,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 4}},
            "objectives": [term | {"num_steps": 2, "guidance": 1.0, "last_steps": 2}],
            "optimizer": {"learning_rate": 2e-2},
        }

    return make


@pytest.mark.parametrize("name", list(TINY))
def test_the_gradient_of_each_native_reward_reaches_the_adapters(recipe_data, name):
    recipe = Recipe.from_data(recipe_data(name))
    metrics = build_trainer(recipe).run_step()
    assert metrics["reward_backprop/grad_norm"] > 0
    assert Recipe.from_data(recipe.to_data()).to_data() == recipe.to_data()


@pytest.mark.parametrize("name", ["hpsv2", "image_reward"])
def test_a_few_steps_raise_the_score_of_the_same_noise(tiny_checkpoint, tmp_path, make_reward, name):
    policy = Policy(load_backbone(str(tiny_checkpoint), device="cpu"), {"lora": LoRA(rank=4)})
    objective = RewardBackprop([(make_reward(name), 1.0)], num_steps=2, guidance=1.0, last_steps=2)
    (tmp_path / "prompts.txt").write_text("a red star\n")

    def score():
        policy.draw = Draw(7, "check", 0)
        batch = Batch(["a red star"] * 8, torch.arange(8))
        with torch.no_grad():
            return objective.loss(policy, batch)[1]["reward"].item()

    before = score()
    source = Prompts(str(tmp_path / "prompts.txt"), 4)
    trainer = Trainer(policy, [Term(objective, source, name="backprop")], steps=8, learning_rate=2e-2)
    for _ in range(8):
        trainer.run_step()
    assert score() > before + 0.05


def test_the_weight_scales_the_loss(recipe_data):
    one, three = (
        build_trainer(Recipe.from_data(recipe_data("hpsv2", weight=weight))).run_step() for weight in (1.0, 3.0)
    )
    assert three["reward_backprop/loss"] == pytest.approx(3 * one["reward_backprop/loss"], rel=1e-5)


def test_the_exact_way_is_refused_when_the_recipe_is_read(recipe_data):
    with pytest.raises(UserError, match=r"objectives\[0\].*'hpsv2' has no gradient.*rewards that work: .*image_reward"):
        Recipe.from_data(recipe_data("hpsv2", preprocessing="exact"))


def test_a_recipe_without_hpsv2s_version_is_refused(recipe_data):
    data = recipe_data("hpsv2")
    del data["objectives"][0]["rewards"]["hpsv2"]["version"]
    with pytest.raises(UserError, match=r"objectives\[0\]\.rewards\.hpsv2\.version: this key is required"):
        Recipe.from_data(data)


def test_a_version_without_quotes_is_refused_with_what_is_allowed(recipe_data):
    with pytest.raises(UserError, match=r"version: got 2\.1; it should be '2\.0' or '2\.1'"):
        Recipe.from_data(recipe_data("hpsv2", version=2.1))


def test_all_are_registered():
    assert set(TINY) | {"vlm_judge", "jpeg_incompressibility"} <= set(registry.available("rewards"))
    fitting = registry.names_that("rewards", lambda found: found.differentiable)
    assert set(TINY) <= set(fitting) and "vlm_judge" not in fitting
