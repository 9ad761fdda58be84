"""The passes that `agsm-rl check` shows are those of a real step, and draws that could be one are named."""

from collections import Counter

import pytest
import torch

from agsm_rl.cli.describe import costs
from agsm_rl.doctor.memory.passes import Passes
from agsm_rl.doctor.memory.predict import predict
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe

PAIRS = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 6, "num_images": 6}
ROLLOUTS = {
    "use": "rollouts",
    "prompts": "builtin:shapes-prompts",
    "rewards": {"brightness": 1.0},
    "num_prompts": 3,
    "images_per_prompt": 2,
    "num_steps": 4,
    "guidance": 3.0,
}


@pytest.fixture
def make_recipe(tiny_checkpoint):
    def make(*objectives):
        return Recipe.from_data(
            {
                "steps": 1,
                "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
                "adapters": {"lora": {"use": "lora", "rank": 2}},
                "objectives": list(objectives),
                "track": [],
            }
        )

    return make


@pytest.mark.parametrize(
    "term",
    [
        {"use": "agsm", "source": PAIRS, "group_size": 3},
        {"use": "ddpo", "source": ROLLOUTS, "images_per_pass": 1},
        {"use": "diffusion_nft", "source": ROLLOUTS, "rows_per_pass": 4, "levels_per_image": 2},
    ],
    ids=lambda term: term["use"],
)
def test_predicted_passes_are_those_of_a_real_step(make_recipe, term):
    recipe = make_recipe(term)
    _, prediction = predict(recipe)
    trainer = build_trainer(recipe)
    rows = Counter()
    inner = trainer.policy.backbone.predict

    def counting(x_t, t, cond):
        found = inner(x_t, t, cond)
        rows["forward"] += len(x_t)
        rows["backward"] += len(x_t) * (torch.is_grad_enabled() and found.requires_grad)
        return found

    trainer.policy.backbone.predict = counting
    trainer.run_step()
    assert sum(passes.forward for passes in prediction.passes.values()) == rows["forward"]
    assert sum(passes.backward for passes in prediction.passes.values()) == rows["backward"] > 0


def test_draws_that_could_be_one_are_named(make_recipe):
    terms = [{"use": "ddpo", "source": ROLLOUTS}, {"use": "diffusion_nft", "source": ROLLOUTS}]
    assert "share       ddpo and diffusion_nft each draw images by equal rollouts" in "\n".join(
        costs(make_recipe(*terms), "not predicted")
    )
    terms[1] = {"use": "diffusion_nft", "source": ROLLOUTS | {"num_steps": 5}}
    assert costs(make_recipe(*terms), "not predicted") == []


def test_passes_read_as_numbers_of_rows():
    assert str(Passes(1280, 320)) == "1,280 forward and 320 backward" and str(Passes(64)) == "64 forward"
