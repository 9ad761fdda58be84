"""Any Python function of images and prompts is a reward, from Python and from a recipe."""

import pytest
import torch
from agsm_rl_rewards.functions import FunctionReward, reward_maker
from agsm_rl_rewards.hpsv2 import HPSv2
from agsm_rl_rewards.trl_style import TRLReward

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Reward, with_defaults
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.resolve import Parts

CODE = """
def red(images, prompts):
    return images[:, 0].mean(dim=(1, 2))

red.differentiable = True
red.range = (0.0, 1.0)

def words(images, prompts):
    return [len(prompt.split()) for prompt in prompts]
"""


def test_a_function_may_give_a_tensor_or_a_list():
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0] = 0.5
    as_tensor = FunctionReward(lambda images, prompts: images[:, 0].mean(dim=(1, 2)))
    as_list = FunctionReward(lambda images, prompts: [len(prompt) for prompt in prompts])
    assert as_tensor(images, ["a", "bc"]).tolist() == [0.0, 0.5]
    assert as_list(images, ["a", "bc"]).tolist() == [1.0, 2.0]
    assert isinstance(with_defaults(as_tensor, Reward), Reward) and not as_tensor.differentiable


@pytest.mark.parametrize("returned", [None, 3.0, [1.0, "high"]])
def test_anything_else_is_named(returned):
    def odd(images, prompts):
        return returned

    with pytest.raises(UserError, match="reward 'odd': a score an image is wanted, but it returned"):
        FunctionReward(odd)(torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_each_kind_is_told_from_the_others():
    def plain(images, prompts):
        return [0.0] * len(prompts)

    def trl(prompts, completions, **columns):
        return [0.0] * len(prompts)

    assert isinstance(reward_maker(plain)(), FunctionReward)
    assert isinstance(reward_maker(trl)(), TRLReward)
    assert reward_maker(HPSv2) is HPSv2


@pytest.fixture
def recipe_data(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(CODE)
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\n")
    monkeypatch.chdir(tmp_path)

    def make(objective):
        return {
            "steps": 1,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": [objective],
        }

    return make


def test_a_recipe_rewards_rollouts_by_functions(recipe_data):
    rollouts = {"use": "rollouts", "prompts": "prompts.txt", "num_prompts": 2, "images_per_prompt": 2, "num_steps": 2}
    rollouts |= {"guidance": 1.0, "rewards": {"own_scores:words": 1.0, "own_scores:red": 10.0}}
    data = recipe_data({"use": "ddpo", "source": rollouts})
    with pytest.raises(UserError, match="--allow-import own_scores"):
        Recipe.from_data(data)
    recipe = Recipe.from_data(data, allow_imports=["own_scores"])
    metrics = build_trainer(recipe, allow_imports=["own_scores"]).run_step()
    assert metrics["ddpo/reward/words"] == 3
    assert metrics["ddpo/reward"] == pytest.approx(3 + 10 * metrics["ddpo/reward/red"])


def test_a_function_that_says_so_is_ascended_by_its_gradient(recipe_data):
    source = {"use": "prompts", "prompts": "prompts.txt", "batch_size": 2}
    term = {"use": "reward_backprop", "source": source, "num_steps": 2, "guidance": 1.0}
    recipe = Recipe.from_data(recipe_data(term | {"rewards": {"own_scores:red": 1.0}}), allow_imports=["own_scores"])
    assert build_trainer(recipe, allow_imports=["own_scores"]).run_step()["reward_backprop/grad_norm"] > 0
    with pytest.raises(UserError, match="'words' has no gradient"):
        Recipe.from_data(recipe_data(term | {"rewards": {"own_scores:words": 1.0}}), allow_imports=["own_scores"])


def test_a_seed_that_nobody_gives_is_the_rewards_own(monkeypatch, tmp_path):
    (tmp_path / "seeded_rewards.py").write_text(
        "class Seeded:\n"
        "    name, range, differentiable = 'seeded', (0.0, 1.0), False\n"
        "    def __init__(self, *, seed: int = 7): self.seed = seed\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parts = Parts(where="x", allow_imports=["seeded_rewards"])
    made = parts.reward("seeded_rewards:Seeded", "y", {"seed": None})
    assert (made.seed, parts.reward("seeded_rewards:Seeded", "y", {"seed": 3}).seed) == (7, 3)
