"""Rewards that misbehave: named, with what they gave; nothing is learned from nonsense, and no folder is left."""

import json

import pytest
from bad_input import assert_refused

MODULE = """
import torch

class Odd:
    name, range, differentiable = "odd", (0.0, 1.0), False

    def __init__(self, *, kind: str):
        if kind == "no constructor":
            raise ValueError("weights are missing")
        if kind == "no constructor at all":
            raise KeyError("weights")
        if kind == "exit when constructed":
            raise SystemExit(0)
        self.kind = kind

    def __call__(self, images, prompts):
        count = len(prompts)
        if self.kind == "exception":
            raise RuntimeError("out of paint")
        if self.kind == "exit":
            raise SystemExit(0)
        if self.kind == "odd exit":
            raise GeneratorExit
        return {
            "NaN": torch.full((count,), float("nan")),
            "infinite": torch.tensor([0.5] * (count - 1) + [float("inf")]),
            "one for all": torch.tensor(1.0),
            "too many": torch.zeros(count + 1),
            "a column": torch.zeros(count, 1),
            "a list": [0.5] * count,
            "nothing": None,
            "constant": torch.full((count,), 0.5),
        }[self.kind]
"""

KINDS = {
    "NaN": ["reward 'Odd'", "nan", "prompt"],
    "infinite": ["reward 'Odd'", "inf", "prompt"],
    "one for all": ["reward 'Odd'", "()", "(4,)"],
    "too many": ["reward 'Odd'", "(5,)", "(4,)"],
    "a column": ["reward 'Odd'", "(4, 1)", "(4,)"],
    "a list": ["reward 'Odd'", "list", "(4,)"],
    "nothing": ["reward 'Odd'", "NoneType", "(4,)"],
    "exception": ["reward 'Odd'", "RuntimeError", "out of paint"],
    "exit": ["reward 'Odd'", "sys.exit(0)"],
    "odd exit": ["reward 'Odd'", "GeneratorExit"],
    "no constructor at all": ["rewards.odd_rewards:Odd", "KeyError: 'weights'"],
    "exit when constructed": ["rewards.odd_rewards:Odd", "SystemExit: 0"],
    "no constructor": ["rewards.odd_rewards:Odd", "weights are missing"],
}


@pytest.fixture
def with_reward(content, tmp_path):
    """DDPO on rollouts with a reward of the module."""
    (tmp_path / "odd_rewards.py").write_text(MODULE)

    def made(rewards):
        own = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": rewards, "num_prompts": 2}
        own |= {"images_per_prompt": 2, "num_steps": 1, "guidance": 1.0}
        return content | {"objectives": [{"use": "ddpo", "source": own}]}

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_finite_score_an_image_ends_the_run(train, with_reward, tmp_path, kind):
    result = train(with_reward({"odd_rewards:Odd": {"kind": kind}}), "--allow-import", "odd_rewards")
    assert_refused(result, *KINDS[kind], folder=tmp_path / "run")


def test_a_constant_reward_is_shown_in_the_metrics(train, with_reward, tmp_path):
    """It is no error (a hard task looks the same at first); the doctor calls it red."""
    result = train(with_reward({"odd_rewards:Odd": {"kind": "constant"}}), "--allow-import", "odd_rewards")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["ddpo/zero_variance"] for line in lines] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("import a_package_that_is_not_there", ["odd_rewards", "a_package_that_is_not_there"]),
        ("class Odd(:\n", ["odd_rewards", "SyntaxError"]),
        ("raise RuntimeError('no licence')", ["odd_rewards", "no licence"]),
        ("raise SystemExit(0)", ["odd_rewards", "SystemExit: 0"]),
        ("class Other: ...", ["has no 'Odd'"]),
    ],
)
def test_code_that_cannot_be_imported_is_told(train, with_reward, tmp_path, module, words, monkeypatch):
    import sys

    (tmp_path / "odd_rewards.py").write_text(module)
    monkeypatch.delitem(sys.modules, "odd_rewards", raising=False)
    result = train(with_reward({"odd_rewards:Odd": {"kind": "a list"}}), "--allow-import", "odd_rewards")
    assert_refused(result, *words, folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ({"odd_rewards:Odd": 1.0}, ["kind", "required"]),
        ({"odd_rewards:Odd": {"kind": "NaN", "knd": 1}}, ["'knd'", "kind"]),
        ({"shapes": {"verdict": "strikt"}}, ["shapes", "verdict", "strict"]),
        ({"shaps": 1.0}, ["'shaps'", "Did you mean 'shapes'?"]),
        ({"brightness": float("nan")}, ["brightness", "nan"]),
    ],
)
def test_rewards_that_a_recipe_cannot_name_are_refused(train, with_reward, tmp_path, rewards, words):
    assert_refused(train(with_reward(rewards), "--allow-import", "odd_rewards"), *words, folder=tmp_path / "run")
