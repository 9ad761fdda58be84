"""The reference: the base, or the model that `start_from` gives, as training begins."""

import shutil
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from agsm_rl.cli.describe import describe, unused
from agsm_rl.doctor.memory.predict import predict
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.lifecycle import train

PAIRS = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 16}
LORA, STYLE = {"use": "lora", "rank": 2, "banks": 2}, {"use": "lora", "rank": 3}


@pytest.fixture
def make_recipe(tiny_checkpoint):
    def make(objectives, **changes) -> Recipe:
        content = {
            "steps": 4,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": LORA},
            "objectives": objectives,
            "optimizer": {"learning_rate": 0.05},
            "checkpoint": {"every": 2},
            "sample": {"every": 100},
            "track": [],
        }
        return Recipe.from_data(content | changes)

    return make


@pytest.fixture
def first(make_recipe, tmp_path):
    """A run whose LoRA changes the prediction."""
    recipe = make_recipe([{"use": "agsm", "source": PAIRS}])
    return train(recipe, tmp_path / "first", console=Console(file=StringIO()), evaluate=False)


@pytest.fixture
def then(make_recipe, first):
    """A second LoRA on top of the first, held by an anchor."""

    def make(**changes) -> Recipe:
        terms = [{"use": use, "source": PAIRS, "trains": ["style"]} for use in ("score_matching", "anchor")]
        return make_recipe(terms, adapters={"lora": LORA, "style": STYLE}, start_from=str(first), **changes)

    return make


def predictions(policy):
    """Live, reference and base for the same inputs."""
    x_t = torch.randn(2, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(7))
    t, cond = torch.tensor([0.2, 0.8]), policy.backbone.encode_text(["a red star", "two blue circles"])
    with torch.no_grad():
        live, reference = policy.live(x_t, t, cond), policy.reference(x_t, t, cond)
        with policy.switched_off():
            return live, reference, policy.backbone.predict(x_t, t, cond)


def changed(policy, *names):
    for name, parameter in policy.parameters(list(names)).items():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))


def test_it_is_the_base_unless_the_recipe_says_otherwise(then):
    live, reference, base = predictions(build_trainer(then()).policy)
    assert torch.equal(reference, base) and not torch.allclose(live, base, rtol=1e-3)


def test_it_is_what_the_run_starts_with_whatever_is_learned(then, make_recipe, first):
    policy = build_trainer(then(reference="start_from")).policy
    start, reference, base = predictions(policy)
    assert torch.equal(reference, start) and not torch.allclose(reference, base, rtol=1e-3)
    changed(policy, "style")
    live, reference, _ = predictions(policy)
    assert torch.equal(reference, start) and not torch.allclose(live, start, rtol=1e-3)

    trained = [{"use": "anchor", "source": PAIRS}]
    policy = build_trainer(make_recipe(trained, start_from=str(first), reference="start_from")).policy
    changed(policy, "lora")
    live, reference, _ = predictions(policy)
    assert torch.equal(reference, start) and not torch.allclose(live, start, rtol=1e-3)


def test_an_anchor_to_the_start_begins_at_no_distance(then):
    for reference, is_zero in (("start_from", True), ("base", False)):
        trainer = build_trainer(then(reference=reference))
        assert (trainer.run_step()["anchor/loss"] == 0) == is_zero
        kept = trainer.policy.parameters(["lora"]) if is_zero else {}
        assert trainer.policy.reference_parameters.keys() == kept.keys()


def test_a_resumed_run_keeps_it_although_the_first_run_has_changed(then, first, tmp_path):
    whole = train(then(reference="start_from"), tmp_path / "whole", console=Console(file=StringIO()), evaluate=False)
    train(then(reference="start_from", steps=2), tmp_path / "run", console=Console(file=StringIO()), evaluate=False)
    shutil.rmtree(first)
    recipe = then(reference="start_from")
    train(recipe, tmp_path / "run", resume=True, console=Console(file=StringIO()), evaluate=False)
    files = sorted(path.relative_to(whole) for path in (whole / "adapter").rglob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        resumed, expected = load_file(tmp_path / "run" / file), load_file(whole / file)
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_a_run_in_which_no_term_looks_at_it_says_so(make_recipe, first, tmp_path):
    heard = {}
    for use in ("score_matching", "anchor"):
        console = Console(file=StringIO(), width=200)
        recipe = make_recipe([{"use": use, "source": PAIRS}], start_from=str(first), reference="start_from", steps=1)
        train(recipe, tmp_path / use, console=console, evaluate=False)
        heard[use] = "reference: start_from changed nothing" in console.file.getvalue()
    assert heard == {"score_matching": True, "anchor": False}


def test_check_says_what_it_is_and_whether_a_term_uses_it(make_recipe, first):
    heard = {}
    for use in ("score_matching", "anchor"):
        recipe = make_recipe([{"use": use, "source": PAIRS}], start_from=str(first), reference="start_from")
        trainer, prediction = predict(recipe)
        assert "reference   the model with the adapters that it starts from" in describe(recipe, trainer)
        heard[use] = unused(recipe, trainer, prediction)
    assert heard == {
        "score_matching": ["reference   start_from changes nothing: no term uses a reference"],
        "anchor": [],
    }


def test_its_memory_is_predicted(then):
    with_it, without = (predict(then(reference=which))[1].resident for which in ("start_from", "base"))
    assert with_it["reference"] > 0 and with_it == without | {"reference": with_it["reference"]}
