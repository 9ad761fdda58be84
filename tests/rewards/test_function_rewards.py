"""Any Python function of images and prompts is a reward, from Python and from a recipe."""

import functools
import itertools

import numpy as np
import pytest
import torch
from agsm_rl_rewards.functions import FunctionReward, as_reward, reward_maker
from agsm_rl_rewards.hpsv2 import HPSv2
from agsm_rl_rewards.trl_style import TRLReward

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Reward
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.training.defaults import with_defaults
from agsm_rl.training.scoring import checked_score

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

    with pytest.raises(UserError, match="reward 'odd': a reward returns one score per image.* 2 numbers; it returned"):
        FunctionReward(odd)(torch.zeros(2, 3, 4, 4), ["a", "b"])


def scaled(images, prompts, scale=2.0):
    return images.mean(dim=(1, 2, 3)) * scale


class Scorer:
    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, pixel_values):
        return self.dropout(pixel_values.mean(dim=(1, 2, 3)) * self.weight)


def swapped(prompts, images):
    return [image.mean() * len(prompt) for image, prompt in zip(images, prompts, strict=True)]


def by_keyword(*, images, prompts):
    return images.mean(dim=(1, 2, 3)).numpy()


def anything(**kwargs):
    return kwargs["images"].mean(dim=(1, 2, 3))


def in_order(*args):
    return args[0].mean(dim=(1, 2, 3))


def position_only(pictures, texts, /, *, scale=1.0):
    return pictures.mean(dim=(1, 2, 3)) * scale


TAKEN = {
    "defaults": (scaled, "scaled", 2.0),
    "further keywords": (lambda images, prompts, **kwargs: images.mean((1, 2, 3)), "lambda", 1.0),
    "keyword-only": (by_keyword, "by_keyword", 1.0),
    "position-only": (position_only, "position_only", 1.0),
    "any keywords": (anything, "anything", 1.0),
    "any positions": (in_order, "in_order", 1.0),
    "a partial": (functools.partial(scaled, scale=3.0), "scaled", 3.0),
    "a partial of a partial": (functools.partial(functools.partial(scaled), scale=4.0), "scaled", 4.0),
    "other names": (lambda x, p: x.mean((1, 2, 3)), "lambda", 1.0),
    "the other order": (swapped, "swapped", 1.0),
    "images alone": (lambda images: images.mean((1, 2, 3)), "lambda", 1.0),
    "an object": (Scorer(), "Scorer", 1.0),
    "a bound method": (Scorer().__call__, "__call__", 1.0),
    "a module": (Network(), "Network", 1.0),
    "a column": (lambda images, prompts: images.mean((1, 2, 3))[:, None], "lambda", 1.0),
    "an array": (lambda images, prompts: images.numpy().mean((1, 2, 3)), "lambda", 1.0),
    "a column as a list": (lambda images, prompts: [[float(image.mean())] for image in images], "lambda", 1.0),
    "a list of tensors": (lambda images, prompts: [image.mean() for image in images], "lambda", 1.0),
    "a list of numpy's numbers": (lambda images, prompts: [np.float64(image.mean()) for image in images], "lambda", 1),
    "scores and a note": (lambda images, prompts: (images.mean((1, 2, 3)), {}), "lambda", 1.0),
    "ddpo-pytorch": (lambda images, prompts, metadata: (images.mean((1, 2, 3)).numpy(), {}), "lambda", 1.0),
    "flow_grpo": (
        lambda images, prompts, metadata, only_strict=True: ({"avg": images.mean((1, 2, 3)).tolist()}, {}),
        "lambda",
        1.0,
    ),
}


@pytest.mark.parametrize("shape", TAKEN)
def test_functions_of_every_common_shape_are_rewards(shape):
    function, name, factor = TAKEN[shape]
    images = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.5)])
    reward = as_reward(function)
    torch.testing.assert_close(reward(images, ["a", "b"]).detach(), factor * torch.tensor([0.25, 0.5]))
    assert reward.name == name and isinstance(reward, Reward)
    assert as_reward(reward) is reward


def test_two_scores_are_not_taken_for_scores_and_a_note():
    reward = as_reward(lambda images, prompts: (0.25, 0.5))
    assert reward(torch.zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [0.25, 0.5]


def test_metadata_is_one_dict_per_image_of_the_functions_own():
    seen = []

    def counted(images, prompts, metadata):
        seen.append([dict(row) for row in metadata])
        metadata[0]["count"] = 99
        return [row.get("count", 0) for row in metadata]

    reward, rows = as_reward(counted), [{"count": 3}, {}]
    assert reward.takes_metadata
    assert reward(torch.zeros(2, 3, 4, 4), ["a", "b"], rows).tolist() == [99, 0]
    assert reward(torch.zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [99, 0]
    assert seen == [[{"count": 3}, {}], [{}, {}]] and rows == [{"count": 3}, {}]


def test_a_functions_attributes_describe_its_reward_also_through_a_partial():
    def bright(images, prompts, scale=1.0):
        return images.mean(dim=(1, 2, 3)) * scale

    bright.differentiable, bright.range, bright.name = True, (0.0, 1.0), "brightness of mine"
    reward = as_reward(functools.partial(bright, scale=0.5))
    assert (reward.differentiable, reward.range, reward.name) == (True, (0.0, 1.0), "brightnessofmine")
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    reward(images, ["a", "b"]).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


async def asynchronous(images, prompts):
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    "function",
    [
        lambda images, prompts, device: 0,
        lambda images, prompts, *, scale: 0,
        lambda: 0,
        lambda prompts: 0,
        asynchronous,
        max,
        range(3),
        Scorer,
    ],
    ids=["three", "keyword without default", "none", "one", "asynchronous", "max", "range", "class"],
)
def test_any_other_shape_is_refused_with_the_shapes_that_are_taken(function):
    wanted = "give an instance" if function is Scorer else r"takes \(images, prompts\), .*metadata.*completions"
    with pytest.raises(UserError, match=wanted):
        as_reward(function)


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
    metrics = build_trainer(recipe).run_step()
    assert metrics["ddpo/reward/words"] == 3
    assert metrics["ddpo/reward"] == pytest.approx(3 + 10 * metrics["ddpo/reward/red"])


def test_a_function_that_says_so_is_ascended_by_its_gradient(recipe_data):
    source = {"use": "prompts", "prompts": "prompts.txt", "batch_size": 2}
    term = {"use": "reward_backprop", "source": source, "num_steps": 2, "guidance": 1.0}
    recipe = Recipe.from_data(recipe_data(term | {"rewards": {"own_scores:red": 1.0}}), allow_imports=["own_scores"])
    assert build_trainer(recipe).run_step()["reward_backprop/grad_norm"] > 0
    with pytest.raises(UserError, match="'words' has no gradient"):
        Recipe.from_data(recipe_data(term | {"rewards": {"own_scores:words": 1.0}}), allow_imports=["own_scores"])


def test_a_seed_that_nobody_gives_is_the_rewards_own(monkeypatch, tmp_path):
    (tmp_path / "seeded_rewards.py").write_text(
        "class Seeded:\n"
        "    name, range, differentiable = 'seeded', (0.0, 1.0), False\n"
        "    def __init__(self, *, seed: int = 7): self.seed = seed\n"
        "    def __call__(self, images, prompts): return images.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parts = Parts(where="x", allow_imports=["seeded_rewards"])
    made = parts.reward("seeded_rewards:Seeded", "y", {"seed": None})
    assert (made.seed, parts.reward("seeded_rewards:Seeded", "y", {"seed": 3}).seed) == (7, 3)


SHAPES = """
import functools
import itertools
import torch

def scaled(images, prompts, scale=2.0):
    return images.mean(dim=(1, 2, 3)) * 0 + scale

three = functools.partial(scaled, scale=3.0)
four = lambda x, p: [4.0] * len(p)

def five(images, prompts, metadata):
    return torch.full((len(prompts), 1), 5.0), {}

class Plain:
    def __init__(self, *, value: float = 6.0): self.value = value
    def __call__(self, images, prompts): return [self.value] * len(prompts)

class Network(torch.nn.Module):
    def forward(self, images): return images.mean(dim=(1, 2, 3)) * 0 + 7

eight = Plain(value=8.0)
nine = 9
"""
NAMES = {"scaled": 2, "three": 3, "four": 4, "five": 5, "Plain": 6, "Network": 7, "eight": 8}


def test_a_recipe_takes_functions_of_every_shape(recipe_data, tmp_path):
    (tmp_path / "shaped_scores.py").write_text(SHAPES)
    rollouts = {"use": "rollouts", "prompts": "prompts.txt", "num_prompts": 1, "images_per_prompt": 2, "num_steps": 1}
    rollouts |= {"guidance": 1.0, "rewards": {f"shaped_scores:{name}": 1.0 for name in NAMES}}
    recipe = Recipe.from_data(recipe_data({"use": "ddpo", "source": rollouts}), allow_imports=["shaped_scores"])
    metrics = build_trainer(recipe).run_step()
    assert {name: metrics[f"ddpo/reward/{name}"] for name in NAMES} == NAMES
    rollouts["rewards"] = {"shaped_scores:nine": 1.0}
    with pytest.raises(UserError, match="rewards.shaped_scores:nine.* a reward function takes"):
        Recipe.from_data(recipe_data({"use": "ddpo", "source": rollouts}), allow_imports=["shaped_scores"])


def test_a_function_sees_the_other_columns_of_its_prompts_file(recipe_data, tmp_path):
    (tmp_path / "counting_scores.py").write_text(
        "def counted(images, prompts, metadata):\n"
        "    return [10.0 * row.pop('count') + len(prompt) for row, prompt in zip(metadata, prompts)], {}\n"
    )
    (tmp_path / "counts.jsonl").write_text('{"prompt": "a", "count": 1}\n{"prompt": "bb", "count": 2}\n')
    rollouts = {"use": "rollouts", "prompts": "counts.jsonl", "num_prompts": 2, "images_per_prompt": 1, "num_steps": 1}
    rollouts |= {"guidance": 1.0, "min_history": 2, "rewards": {"counting_scores:counted": 1.0}}
    recipe = Recipe.from_data(recipe_data({"use": "ddpo", "source": rollouts}), allow_imports=["counting_scores"])
    trainer = build_trainer(recipe)
    assert [trainer.run_step()["ddpo/reward/counted"] for _ in range(2)] == [16.5, 16.5]


ODD_SCORES = {
    "a text": lambda count: "0" * count,
    "bytes": lambda count: b"a" * count,
    "a set": lambda count: {index / 10 for index in range(count)},
    "complex numbers": lambda count: np.zeros(count, complex),
    "dates": lambda count: np.zeros(count, "datetime64[s]"),
    "records": lambda count: np.zeros(count, [("score", "f4")]),
    "masked numbers": lambda count: np.ma.masked_all(count),
    "no end": lambda count: itertools.repeat(0.5),
    "a sparse tensor": lambda count: torch.zeros(count).to_sparse(),
    "a meta tensor": lambda count: torch.zeros(count, device="meta"),
    "a nested tensor": lambda count: torch.nested.nested_tensor([torch.zeros(1)] * count),
    "an object without a repr": lambda count: [type("Odd", (), {"__repr__": lambda self: 1 / 0})()] * count,
}


@pytest.mark.parametrize("case", ODD_SCORES)
def test_what_only_looks_like_scores_is_refused(case):
    reward = as_reward(lambda images, prompts: ODD_SCORES[case](len(prompts)))
    with pytest.raises(UserError, match="one score per image"):
        checked_score(reward, torch.rand(4, 3, 8, 8), ["a"] * 4)


@pytest.mark.parametrize("case", ["complex", "sparse", "meta"])
def test_a_reward_class_may_not_return_such_a_tensor_either(case):
    class Odd:
        name, range, differentiable, elsewhere = "odd", (0.0, 1.0), False, False

        def __call__(self, images, prompts):
            plain = torch.zeros(len(prompts))
            return {"complex": plain + 1j, "sparse": plain.to_sparse(), "meta": plain.to("meta")}[case]

    with pytest.raises(UserError, match="reward 'odd': it returned .* one score per image"):
        checked_score(Odd(), torch.rand(4, 3, 8, 8), ["a"] * 4)
