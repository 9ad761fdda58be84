"""Reward functions written for today's TRL are rewards here, from Python and from a recipe."""

import pytest
import torch
from agsm_rl_rewards.jpeg import JpegCompressibility
from agsm_rl_rewards.trl_style import TRLReward
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe


def test_prompts_and_pil_images_go_in_by_keyword_and_scores_come_out():
    seen = {}

    def length_and_redness(completions, prompts, **columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [
            len(prompt) + image.getpixel((0, 0))[0] / 255 for prompt, image in zip(prompts, completions, strict=True)
        ]

    images = torch.zeros(2, 3, 4, 6)
    images[1, 0] = 1.0
    reward = TRLReward(length_and_redness)
    assert reward(images, ["a", "bcd"]).tolist() == [1.0, 4.0]
    assert reward.name == "length_and_redness"
    assert all(isinstance(image, Image.Image) and image.size == (6, 4) for image in seen["completions"])
    assert seen["columns"] == {}


def test_columns_come_as_lists_with_a_value_an_image():
    def counted(prompts, completions, number, **_):
        return [float(value) for value in number]

    reward = TRLReward(counted, columns={"three stars": {"number": 3}, "a star": {"number": 1}})
    assert reward(torch.zeros(3, 3, 2, 2), ["a star", "three stars", "a star"]).tolist() == [1, 3, 1]
    with pytest.raises(UserError, match="reward 'counted': columns have no 'number' for the prompt 'two stars'"):
        reward(torch.zeros(1, 3, 2, 2), ["two stars"])


def test_a_function_that_wants_a_column_is_refused_before_anything_is_drawn(recipe_data, tmp_path):
    (tmp_path / "answering.py").write_text(
        "def answered(prompts, completions, answer): return [float(a) for a in answer]"
    )
    rollouts = recipe_data["objectives"][0]["source"]
    rollouts["rewards"] = {"answering:answered": 1.0}
    recipe = Recipe.from_data(recipe_data, allow_imports=["answering"])
    with pytest.raises(UserError, match="reward 'answered': it requires 'answer', but .* no such column .*columns="):
        build_trainer(recipe)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a star", "answer": 3}')
    rollouts["prompts"] = "prompts.jsonl"
    assert build_trainer(Recipe.from_data(recipe_data, allow_imports=["answering"])).run_step()["ddpo/reward"] == 3


def test_a_file_s_columns_go_to_a_function_as_far_as_it_takes_them():
    seen = {}

    def picky(prompts, completions, number=0):
        seen.update(number=number)
        return [0.0] * len(prompts)

    def greedy(prompts, completions, **columns):
        seen.update(columns)
        return [0.0] * len(prompts)

    rows = [{"number": 3, "kind": "a"}, {"number": 1}]
    TRLReward(picky)(torch.zeros(2, 3, 2, 2), ["a", "b"], rows)
    assert seen == {"number": [3, 1]}
    TRLReward(greedy)(torch.zeros(2, 3, 2, 2), ["a", "b"], rows)
    assert seen == {"number": [3, 1], "kind": ["a", None]}


def test_a_function_that_cannot_be_called_by_keyword_is_refused():
    def odd(prompts, /, completions):
        return [0.0] * len(prompts)

    with pytest.raises(UserError, match="reward 'odd': it cannot be called by keyword"):
        TRLReward(odd)


@pytest.mark.parametrize(
    ("returned", "message"),
    [(0.5, "a reward returns one score per image.* it returned float: 0.5"), ([1.0, None], "it returned None, .*'b'")],
)
def test_nonsense_is_named(returned, message):
    def odd(prompts, completions):
        return returned

    with pytest.raises(UserError, match=f"reward 'odd': {message}"):
        TRLReward(odd)(torch.zeros(2, 3, 2, 2), ["a", "b"])


@pytest.fixture
def recipe_data(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def wide(completions, **kwargs): return [float(i.width) for i in completions]"
    )
    monkeypatch.chdir(tmp_path)
    rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"my_rewards:wide": 2.0}}
    rollouts |= {"num_prompts": 1, "images_per_prompt": 2, "num_steps": 2, "guidance": 1.0}
    return {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "objectives": [{"use": "ddpo", "source": rollouts}],
    }


def test_a_recipe_names_the_function_that_the_command_line_allows(recipe_data):
    recipe = Recipe.from_data(recipe_data, allow_imports=["my_rewards"])
    metrics = build_trainer(recipe).run_step()
    assert metrics["ddpo/reward/wide"] == 16
    assert metrics["ddpo/reward"] == 32


def test_without_permission_nothing_is_imported(recipe_data):
    with pytest.raises(UserError, match="--allow-import my_rewards"):
        Recipe.from_data(recipe_data)


def test_a_reward_of_ours_is_not_taken_for_one():
    from agsm_rl_rewards.trl_style import is_trl_style

    assert not is_trl_style(JpegCompressibility)
    assert not is_trl_style(JpegCompressibility())
