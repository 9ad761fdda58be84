"""All mistakes of a recipe are reported together, and those that need no import are found without any."""

import subprocess
import sys

import pytest
import yaml

from agsm_rl.errors import Mistakes, UserError
from agsm_rl.recipe import Recipe
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.options import options_model
from agsm_rl.recipe.signatures import model_in_source
from agsm_rl.registry import BUILTIN, load

GOOD = {
    "steps": 2,
    "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
    "adapters": {"lora": {"use": "lora"}},
    "objectives": [{"use": "agsm", "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8}}],
    "track": [],
}


def mistakes(**changes):
    with pytest.raises(UserError) as raised:
        Recipe.from_data(GOOD | changes)
    return raised.value.messages if isinstance(raised.value, Mistakes) else (str(raised.value),)


def assert_each(messages, *beginnings):
    assert len(messages) == len(beginnings), messages
    for beginning in beginnings:
        assert sum(message.startswith(f"recipe: {beginning}") for message in messages) == 1, (beginning, messages)


def test_wrong_keys_and_wrong_blocks_are_reported_together():
    found = mistakes(
        stepz=3,
        seed=-1,
        adapters={"lora": {"use": "lora", "rnk": 8}, "tokens": {"use": "soft_tokenz"}},
        evaluate={"every": 0, "suit": "shapes", "rewards": ["shapez"]},
    )
    assert_each(
        found,
        "'stepz' is not an option",
        "seed: got -1",
        "adapters.lora: 'rnk'",
        "adapters.tokens.use: 'soft_tokenz'",
        "evaluate: 'suit'",
        "evaluate.every: got 0",
        "evaluate.rewards[0]: 'shapez'",
    )


def test_the_options_of_all_blocks_are_reported_together():
    objectives = [{"use": "agsm", "evry": 2, "source": "own"}, {"use": "ddpo", "clip_range": "wide", "source": "other"}]
    sources = {"own": {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"shapez": 1, "sharp": 2}}}
    found = mistakes(
        adapters={"lora": {"use": "lora", "rank": "x"}}, objectives=objectives, sources=sources, track=["x"]
    )
    assert_each(
        found,
        "adapters.lora.rank: got 'x'",
        "sources.own.rewards.shapez: 'shapez'",
        "sources.own.rewards.sharp: 'sharp'",
        "objectives[0]: 'evry' is not an option",
        "objectives[1].clip_range: got 'wide'",
        "objectives[1].source: 'other'",
        "track[0]: 'x'",
    )
    assert "Did you mean 'every'?" in next(message for message in found if "'evry'" in message)


def test_what_does_not_go_together_is_reported_term_by_term():
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 5}
    found = mistakes(
        objectives=[{"use": "agsm", "source": pairs}, {"use": "ddpo", "source": pairs | {"dataset": "./nowhere"}}],
        stop_when={"shapes": {"falls_by": 1}},
    )
    assert_each(
        found,
        "objectives[0] on objectives[0].source: batch_size 5",
        "objectives[1].source.dataset: './nowhere'",
        "stop_when.shapes: 'shapes' is not measured",
    )


def test_a_mistake_in_a_source_that_two_terms_share_is_reported_once():
    sources = {"own": {"use": "rollouts", "prompts": "./nowhere", "rewards": {"sharpness": 1.0}}}
    terms = [{"use": "ddpo", "source": "own"}, {"use": "diffusion_nft", "source": "own"}]
    assert_each(mistakes(sources=sources, objectives=terms), "sources.own.prompts: './nowhere'")


def test_a_single_mistake_is_a_single_line_and_a_value_is_reported_once():
    (message,) = mistakes(optimizer={"learning_rate": "fast"})
    assert message.startswith("recipe: optimizer.learning_rate: got 'fast'") and "\n" not in message


def test_a_misspelt_required_key_is_not_also_reported_as_missing():
    data = {key: value for key, value in GOOD.items() if key != "steps"} | {"stepz": 2}
    with pytest.raises(UserError, match="Did you mean 'steps'") as raised:
        Recipe.from_data(data)
    assert "required" not in str(raised.value)


@pytest.mark.parametrize("kind", BUILTIN)
def test_signatures_read_from_source_accept_the_options_of_the_imported_classes(kind):
    for name, target in BUILTIN[kind].items():
        read = model_in_source(target)
        if read is None:
            continue
        imported = options_model(load(kind, name, where=name), where=name)
        assert list(read.model_fields) == list(imported.model_fields), name
        for option, field in imported.model_fields.items():
            assert read.model_fields[option].is_required() == field.is_required(), (name, option)


HEAVY = ("torch", "diffusers", "transformers", "peft", "datasets", "numpy")


def test_a_wrong_key_beside_wrong_options_is_refused_without_a_heavy_import(tmp_path):
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump(GOOD | {"stepz": 1, "adapters": {"lora": {"use": "lora", "rnk": 1}}})
    )
    code = "\n".join(
        [
            "import sys, agsm_rl.cli.commands",
            "try: agsm_rl.cli.commands.app(['check', 'x.yaml'])",
            f"except SystemExit: print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "x.yaml: 2 mistakes:\n- 'stepz'" in done.stderr and "adapters.lora: 'rnk'" in done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_places_that_are_not_there_are_reported_together_and_before_a_hub_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr("agsm_rl.recipe.build.build_backbone", lambda *_, **__: asked.append(1))
    backbone = {"use": "stable_diffusion", "checkpoint": "owner/name", "lora": "./gone.safetensors", "unet": "./away"}
    recipe = Recipe.from_data(GOOD | {"backbone": backbone, "start_from": "runs/gone"})
    with pytest.raises(Mistakes) as raised:
        build_trainer(recipe)
    messages = raised.value.messages
    assert_each(
        messages, "backbone.lora: './gone", "backbone.unet: './away'", "start_from: runs/gone: there is no such"
    )
    assert not asked
