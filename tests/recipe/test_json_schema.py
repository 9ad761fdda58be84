"""The JSON Schema for editors accepts what is accepted, refuses what is misspelt, and explains every key."""

import json

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.recipe.shipped import shipped_recipes

GOOD = {
    "steps": 2,
    "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
    "adapters": {"lora": {"use": "lora"}},
    "objectives": [{"use": "agsm", "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8}}],
}


@pytest.fixture(scope="module")
def schema():
    printed = CliRunner().invoke(app, ["schema"])
    assert printed.exit_code == 0, printed.output
    return json.loads(printed.stdout)


@pytest.fixture(scope="module")
def validator(schema):
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_accepted(name, validator):
    data = yaml.safe_load(shipped_recipes()[name].read_text())
    assert [error.message for error in validator.iter_errors(json.loads(json.dumps(data)))] == []


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"stepz": 3}, []),
        ({"steps": "many"}, ["steps"]),
        ({"adapters": {"lora": {"use": "lora", "rnk": 8}}}, ["adapters", "lora"]),
        ({"adapters": {"lora": {"use": "lora", "rank": "x"}}}, ["adapters", "lora", "rank"]),
        ({"adapters": {"lora": {"use": "lorra"}}}, ["adapters", "lora", "use"]),
        ({"backbone": {"use": "stable_diffusion"}}, ["backbone"]),
        ({"objectives": [{"use": "agsm", "evry": 2, "source": "own"}]}, ["objectives", 0]),
        ({"evaluate": {"every": 0}}, ["evaluate"]),
        ({"sample": {"evry": 1}}, ["sample"]),
    ],
)
def test_what_is_misspelt_is_marked_where_it_is(changes, place, validator):
    places = [list(error.absolute_path) for error in validator.iter_errors(GOOD | changes)]
    assert places and all(found[: len(place)] == place for found in places)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapters": {"mine": {"use": "my.module:Adapter", "anything": 1}}},
        {"objectives": [{"use": "ddpo", "source": "own", "weight": {"0": 0.0, "100": 1.0}}]},
        {"evaluate": {"guidance": 3.0, "rewards": {"mine": {"use": "my:reward"}}}},
        {"optimizer": {"schedule": "cosine", "learning_rate": {"lora": 1e-4}}},
        {"evaluate": {"suites": {"mine": {"use": "rewards", "prompts": "p.txt", "rewards": ["sharpness"]}}}},
        {"evaluate": {"suites": {"mine": {"use": "rewards", "prompts": "p.txt", "rewards": {"sharpness": None}}}}},
    ],
)
def test_short_forms_and_other_people_s_classes_are_accepted(changes, validator):
    assert [error.message for error in validator.iter_errors(GOOD | changes)] == []


def test_keys_and_options_are_explained(schema):
    assert schema["properties"]["steps"]["description"].startswith("Number of optimiser steps")
    lora = next(
        case["then"]["properties"]
        for case in schema["definitions"]["adapters"]["allOf"]
        if case["if"]["properties"]["use"]["const"] == "lora"
    )
    assert lora["rank"]["description"] == "Rank of the additions, 1 or more. Default: 8."
