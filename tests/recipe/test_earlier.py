"""What a recipe of an earlier version means: options that came in later have their first defaults."""

from copy import deepcopy

import pytest
import yaml

from agsm_rl import registry
from agsm_rl.errors import UserError
from agsm_rl.recipe import earlier
from agsm_rl.recipe.earlier import FIRST_DEFAULTS, read_earlier, recipe_of_today
from agsm_rl.recipe.options import RewardOptions, options_model
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Evaluate, RecipeKeys, SuiteBlock, TermBlock
from agsm_rl.recipe.shipped import shipped_recipes
from agsm_rl.training.optimizers import OPTIMIZERS
from agsm_rl.training.schedules import SCHEDULES

SECTIONS = {"recipe": RecipeKeys, "evaluate": Evaluate, "suite": SuiteBlock, "term": TermBlock}
SECTIONS |= {"weighted_reward": RewardOptions}
PAIRS = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8}
ROLLOUTS = {"use": "rollouts", "prompts": "builtin:shapes-prompts"}
ROLLOUTS |= {"rewards": {"shapes": 1.0, "small": {"use": "shapes", "verdict": "graded", "weight": 0.5}}}
RECIPE = {
    "steps": 3,
    "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15", "device": "cpu"},
    "adapters": {"lora": {"use": "lora", "banks": 2}, "tokens": {"use": "soft_tokens"}},
    "sources": {"own_images": ROLLOUTS},
    "objectives": [
        {
            "use": "agsm",
            "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8},
            "weight": {0: 0.0, 9: 1.0},
        },
        {"use": "score_matching", "source": "own_images", "view": {"use": "best_images", "share": 0.5}},
    ],
    "evaluate": {"num_images": 4, "rewards": {"shapes": {"verdict": "graded"}, "brightness": None}},
}


def defaults(model):
    """The options of a schema that have defaults, as plain data."""
    return model.model_construct().model_dump(mode="json", warnings=False)


def options_of_today():
    """Every option that has a default, in the form of first_defaults.yaml."""
    parts = Parts(where="")
    options = {name: defaults(model) for name, model in SECTIONS.items()}
    for kind, names in registry.BUILTIN.items():
        options[kind] = {name: defaults(options_model(parts.load(kind, name, name), where=name)) for name in names}
    for kind, classes in {"optimizers": OPTIMIZERS, "schedules": SCHEDULES}.items():
        options[kind] = {name: defaults(options_model(found, where=name)) for name, found in classes.items()}
    return options


def lacking(options, recorded):
    """What `recorded` lacks of the options, in the same form."""
    found = {}
    for name, value in options.items():
        if name not in recorded:
            found[name] = value
        elif isinstance(value, dict) and isinstance(recorded[name], dict) and (inner := lacking(value, recorded[name])):
            found[name] = inner
    return found


def without_first_defaults(data, first):
    """Plain data without what is as in `first`: what a version would have stored that had no such options."""
    kept = {}
    for key, value in data.items():
        if isinstance(value, dict) and isinstance(first.get(key), dict):
            kept[key] = without_first_defaults(value, first[key])
        elif key not in first or value != first[key]:
            kept[key] = value
    return kept


def as_stored_before(data):
    """A complete recipe's data as if every option that has its first default had come in later."""
    first = earlier._first_defaults()

    def block(kind, given):
        if not isinstance(given, dict):
            return given
        stored = without_first_defaults(given, first[kind][given["use"]])
        if "rewards" in stored:
            stored["rewards"] = {key: reward(key, entry) for key, entry in stored["rewards"].items()}
        return stored

    def reward(key, entry):
        if not isinstance(entry, dict):
            return entry
        stored = without_first_defaults(entry, first["rewards"][entry.get("use", key)])
        return stored["weight"] if list(stored) == ["weight"] else stored

    def suite(given):
        stored = without_first_defaults(given, first["suites"][given["use"]] | first["suite"])
        return stored | {"rewards": {key: reward(key, entry) for key, entry in given["rewards"].items()}}

    stored = without_first_defaults(data, first["recipe"])
    stored["backbone"] = block("backbones", data["backbone"])
    stored["adapters"] = {name: block("adapters", given) for name, given in data["adapters"].items()}
    stored["sources"] = {name: block("sources", given) for name, given in data["sources"].items()}
    stored["objectives"] = [
        without_first_defaults(block("objectives", term), first["term"]) for term in data["objectives"]
    ]
    for term, complete in zip(stored["objectives"], data["objectives"], strict=True):
        term["source"] = block("sources", complete["source"])
        if complete["view"]:
            term["view"] = block("views", complete["view"])
    if data["evaluate"]:
        stored["evaluate"] = without_first_defaults(data["evaluate"], first["evaluate"])
        suites = data["evaluate"].get("suites", {})
        stored["evaluate"] |= {"suites": {name: suite(given) for name, given in suites.items()}} if suites else {}
        if not suites:
            rewards = data["evaluate"]["rewards"]
            stored["evaluate"]["rewards"] = {key: reward(key, entry) for key, entry in rewards.items()}
    return stored


@pytest.fixture
def first(monkeypatch):
    """Change first defaults: `first("adapters", "lora", rank=3)` has rank come in with 3."""
    record = deepcopy(earlier._first_defaults())
    monkeypatch.setattr(earlier, "_first_defaults", lambda: record)

    def change(*path, **options):
        section = record
        for name in path:
            section = section[name]
        section |= options

    return change


def test_every_option_has_a_first_default():
    missing = lacking(options_of_today(), earlier._first_defaults())
    assert not missing, (
        f"new options; add each to {FIRST_DEFAULTS.name}, with the value that leaves everything as it was before it "
        f"came in:\n{yaml.safe_dump(missing, sort_keys=False)}"
    )


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_stored_recipe_means_the_same_whichever_options_it_lacks(name, users_data):
    data = Recipe.from_yaml(shipped_recipes()[name]).to_data()
    stored = as_stored_before(data)
    assert len(yaml.safe_dump(stored)) < 0.8 * len(yaml.safe_dump(data))
    assert recipe_of_today(data, where=name).to_data() == data
    assert recipe_of_today(stored, where=name).to_data() == data


def test_an_option_that_a_stored_recipe_lacks_has_its_first_default_whatever_todays_is(first):
    stored = as_stored_before(Recipe.from_data(RECIPE).to_data())

    first("recipe", export="ema")
    first("recipe", "optimizer", weight_decay=0.5)
    first("evaluate", num_steps=3)
    first("term", offset=1)
    first("objectives", "agsm", gamma_positive=0.25)
    first("backbones", "stable_diffusion", dtype="bfloat16")
    first("adapters", "lora", rank=3)
    first("sources", "pairs", shuffle_buffer=9)
    first("sources", "rollouts", guidance=2.5)
    first("views", "best_images", min_advantage=0.125)
    first("rewards", "shapes", verdict="graded")

    recipe = recipe_of_today(stored, where="")
    agsm, matching = recipe.objectives
    assert (recipe.export, recipe.optimizer.weight_decay, recipe.evaluate.num_steps) == ("ema", 0.5, 3)
    assert (agsm.offset, agsm.options["gamma_positive"]) == (1, 0.25)
    assert recipe.backbone.options["dtype"] == "bfloat16"
    assert recipe.adapters["lora"].options["rank"] == 3
    assert agsm.source.options["shuffle_buffer"] == 9
    assert recipe.sources["own_images"].options["guidance"] == 2.5
    assert matching.view.options["min_advantage"] == 0.125
    assert recipe.sources["own_images"].options["rewards"]["shapes"] == {"weight": 1.0, "verdict": "graded"}
    assert recipe.objectives[0].weight == {0: 0.0, 9: 1.0}


def test_what_a_stored_recipe_says_stays(first):
    data = Recipe.from_data(RECIPE).to_data()
    first("adapters", "lora", rank=3)
    first("recipe", "optimizer", weight_decay=0.5)
    first("objectives", "agsm", gamma_positive=0.25)
    assert recipe_of_today(data, where="").to_data() == data


def test_a_stored_recipe_is_read_with_changes(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(as_stored_before(Recipe.from_data(RECIPE).to_data())))
    assert read_earlier(file, ["steps=9"]).to_data() == Recipe.from_data(RECIPE | {"steps": 9}).to_data()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": None}, "backbone"),
        ({"backbone": {"use": "stable_diffusion", "checkpoint": "x", "gone": 1}}, "'gone' is not an option here"),
        ({"objectives": "agsm"}, "objectives"),
        ({"objectives": ["agsm"]}, r"objectives\[0\]"),
        ({"evaluate": 3}, "evaluate"),
        ({"adapters": ["lora"]}, "adapters"),
        ({"objectives": [{"use": "agsm"}]}, r"objectives\[0\].source"),
    ],
)
def test_a_malformed_stored_recipe_is_refused_in_one_message(change, message):
    with pytest.raises(UserError, match=f"here: {message}|here: .*{message}"):
        recipe_of_today(deepcopy(RECIPE) | change, where="here")
