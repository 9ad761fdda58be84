"""Recipes: what they mean, and that each mistake is reported with its place and its remedy."""

import copy
from pathlib import Path

import pytest
import yaml

from agsm_rl.errors import UserError
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.rewards import directions
from agsm_rl.recipe.yaml_file import apply_overrides, parse_yaml

CONTENT = {
    "steps": 10,
    "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
    "adapters": {"tokens": {"use": "soft_tokens", "num_tokens": 4}, "lora": {"use": "lora", "rank": 8}},
    "ema": {"decay": 0.999},
    "sources": {"own_images": {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"shapes": 1.0}}},
    "objectives": [
        {"use": "agsm", "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8}},
        {"use": "ddpo", "source": "own_images", "weight": {0: 0.0, 100: 1.0}, "every": 2, "trains": ["lora"]},
    ],
    "evaluate": {"suite": "shapes", "every": 100, "num_images": 200, "rewards": ["shapes"]},
}


@pytest.fixture
def write(tmp_path):
    """Write a recipe's text, or CONTENT, and return its path."""

    def written(text: str | None = None):
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump(CONTENT) if text is None else text)
        return path

    return written


def test_the_contract_s_recipe_is_read_with_every_default_filled_in(write):
    recipe = Recipe.from_yaml(write())
    assert recipe.objectives[0].options["temperature"] == 0.1
    assert recipe.backbone.options["dtype"] == "float32"
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.track == ["tensorboard"]
    assert [term.name for term in recipe.objectives] == ["agsm", "ddpo"]


def test_the_resolved_recipe_reads_back_as_the_same_recipe(write):
    recipe = Recipe.from_yaml(write())
    assert Recipe.from_yaml(write(recipe.to_yaml())) == recipe
    assert Recipe.from_yaml(write(recipe.to_yaml())).objectives[1].weight == {0: 0.0, 100: 1.0}


def test_an_objective_used_twice_gets_two_names():
    content = copy.deepcopy(CONTENT)
    content["objectives"].append(copy.deepcopy(content["objectives"][0]))
    assert [term.name for term in Recipe.from_data(content).objectives] == ["agsm", "ddpo", "agsm_2"]


@pytest.mark.parametrize("weight", [0, {0: 0.0, 5: 0.0}])
def test_a_term_that_never_learns_takes_no_name_from_one_that_does(weight):
    # Noise hangs on the name.
    content = copy.deepcopy(CONTENT)
    content["objectives"].insert(0, copy.deepcopy(content["objectives"][0]) | {"weight": weight})
    assert [term.name for term in Recipe.from_data(content).objectives] == ["agsm_2", "agsm", "ddpo"]


def test_rollouts_can_feed_an_objective_that_needs_pairs():
    content = copy.deepcopy(CONTENT)
    content["objectives"][0]["source"] = "own_images"
    assert Recipe.from_data(content).objectives[0].source == "own_images"


def test_a_reward_may_have_options_of_its_own():
    content = copy.deepcopy(CONTENT)
    content["sources"]["own_images"]["rewards"] = {"shapes": {"weight": 0.5, "verdict": "lenient"}}
    rewards = Recipe.from_data(content).sources["own_images"].options["rewards"]
    assert rewards == {"shapes": {"weight": 0.5, "verdict": "lenient"}}


def test_a_reward_used_twice_has_a_name_for_each_use():
    content = copy.deepcopy(CONTENT)
    given = {"shapes": 1.0, "kind": {"use": "shapes", "weight": -0.5, "verdict": "lenient", "normalise": "z_score"}}
    content["sources"]["own_images"]["rewards"] = given
    recipe = Recipe.from_data(content)
    assert recipe.sources["own_images"].options["rewards"] == {
        "shapes": {"weight": 1.0, "verdict": "strict"},
        "kind": given["kind"],
    }
    assert Recipe.from_data(recipe.to_data()) == recipe
    made = recipe.parts.construct("sources", recipe.sources["own_images"], "sources.own_images", seed=0).rewards
    assert [(one.name, one.weight, one.normalise) for one in made] == [
        ("shapes", 1.0, "raw"),
        ("kind", -0.5, "z_score"),
    ]
    assert [one.reward.verdict for one in made] == ["strict", "lenient"]


def test_evaluated_rewards_take_options_and_are_held_out_unless_a_term_learns_from_just_that():
    content = copy.deepcopy(CONTENT)
    content["sources"]["own_images"]["rewards"] = {"shapes": 1.0, "sharpness": {"weight": -1.0}, "brightness": 0.0}
    content["evaluate"]["rewards"] = {
        "strictly": {"use": "shapes"},
        "kindly": {"use": "shapes", "verdict": "lenient"},
        "sharpness": None,
        "brightness": {},
    }
    recipe = Recipe.from_data(content)
    assert directions(recipe) == {"strictly": 1, "kindly": 0, "sharpness": -1, "brightness": 0}
    assert Recipe.from_data(recipe.to_data()) == recipe
    content["evaluate"]["rewards"] = ["shapes", "sharpness"]
    assert directions(Recipe.from_data(content)) == {"shapes": 1, "sharpness": -1}


@pytest.mark.parametrize(
    ("override", "value"),
    [("objectives.0.temperature=0.2", 0.2), ("objectives[0].temperature=2e-1", 0.2)],
)
def test_set_changes_a_value_in_a_list(write, override, value):
    assert Recipe.from_yaml(write(), [override]).objectives[0].options["temperature"] == value


def test_set_adds_a_missing_section_and_changes_a_schedule(write):
    recipe = Recipe.from_yaml(write(), ["checkpoint.every=7", "objectives.1.weight.100=2"])
    assert recipe.checkpoint.every == 7
    assert recipe.objectives[1].weight == {0: 0.0, 100: 2.0}


WRONG = {
    "stps=1": "'stps' is not an option here.*Did you mean 'steps'",
    "evaluate.evry=1": "evaluate: 'evry'.*Did you mean 'every'",
    "objectives.1.use=ddppo": r"objectives\[1\].use: 'ddppo' is not an objective.*Did you mean 'ddpo'\?",
    "objectives.0.temperatur=1": r"objectives\[0\]: 'temperatur' is not an option.*Did you mean 'temperature'",
    "objectives.0.temperature=0": r"objectives\[0\]: temperature.*above 0",
    "objectives.0.source=nowhere": r"objectives\[0\].source: 'nowhere' is not a source of this recipe; allowed: own",
    "objectives.0.source=7": r"objectives\[0\].source: a source is a name from `sources:`",
    "objectives.0.source.use=pars": r"source.use: 'pars' is not a source.*'pairs'",
    "objectives.0.source.batch_size=6": r"objectives\[0\].*batch_size 6 is not a multiple of group_size 4",
    "objectives.0.source.dataset=./nope": r"source.dataset: './nope': there is no such file or folder",
    "objectives.1.source={use: pairs, dataset: builtin:shapes, batch_size: 8}": (
        r"objectives\[1\].source: 'ddpo' learns from a RolloutBatch, but 'pairs' gives a PairBatch.*work: rollouts"
    ),
    "objectives.1.trains=[lroa]": r"objectives\[1\].trains: 'lroa'.*Did you mean 'lora'",
    "objectives.0.weight=-1": r"objectives\[0\].weight: a weight must be finite and at least 0; got -1",
    "objectives.0.weight=.nan": r"objectives\[0\].weight: .*got nan",
    "objectives.0.weight=true": r"objectives\[0\]: 'weight' is true, but it must be a number",
    "objectives.0.weight={}": r"objectives\[0\].weight: .*empty",
    "objectives.0.every=0": r"objectives\[0\].every: got 0",
    "objectives.0.t=[0.5, 0.5]": r"objectives\[0\].t: .*low < high",
    "objectives.1.t=[0.5, 1.0]": r"objectives\[1\].t is .*, but DDPO learns from sampling steps.*leave it out",
    "objectives.0.t=[0, 2]": r"objectives\[0\].t: .*got \[0.0, 2.0\]",
    "objectives=[]": "objectives: it is empty, so nothing would be learned",
    "objectives.1.name=a b": r"objectives\[1\].name: 'a b' is not a valid name",
    "adapters={}": "adapters: it is empty, so nothing would be trained.*lora",
    "adapters.lora.rank=x": "adapters.lora.rank: got 'x'",
    "adapters.lora=7": "adapters.lora: got 7; it should be a mapping",
    "adapters.a/b={use: lora}": "'a/b' is not a valid name",
    "steps=0": "steps: got 0.*greater than or equal to 1",
    "steps=true": "'steps' is true, but it must be a number",
    "steps=.inf": "steps: got inf",
    "backbone.dtype=int8": "backbone.dtype: got 'int8'.*float32",
    "backbone.use=os:system": "backbone.use: 'os:system'.*--allow-import os",
    "sources.own_images.rewards={}": "sources.own_images.rewards: ",
    "sources.own_images.rewards.shaps=1": "rewards.shaps: 'shaps' is not a reward.*'shapes'",
    "evaluate.rewards=[shaps]": r"evaluate.rewards\[0\]: 'shaps' is not a reward",
    "sources.own_images.rewards.shapes={normalize: raw}": "rewards.shapes: 'normalize'.*Did you mean 'normalise'",
    "sources.own_images.rewards.shapes={normalise: zscore}": "rewards.shapes.normalise: got 'zscore'.*'z_score'",
    "sources.own_images.rewards.mine={use: shaps}": "rewards.mine.use: 'shaps' is not a reward.*'shapes'",
    "sources.own_images.rewards={a/b: {use: shapes}}": "own_images: rewards: 'a/b' is not a valid name",
    "sources.own_images.rewards={shapes: 0}": "own_images: rewards: all weights are 0",
    "evaluate.rewards={shapes: {weight: 1}}": "evaluate.rewards.shapes: 'weight' has no effect here",
    "evaluate.rewards={strict: {use: shapes}}": "evaluate.rewards.strict: this is the name of one of the suite's own",
    "evaluate.rewards={shapes: {verdict: kind}}": "evaluate.rewards.shapes.verdict: got 'kind'",
    "evaluate.rewards=[shapes, shapes]": "evaluate.rewards: a reward is listed twice",
    "evaluate.rewards={shapes: 1.0}": "evaluate.rewards: 'shapes' is 1.0, but rewards are only measured.*shapes: {}",
    "checkpoint.best=sharpness": "checkpoint.best: 'sharpness' is not a score .*allowed: overall, shapes, strict",
    "stop_when.shaps.falls_by=1": "stop_when.shaps: 'shaps' is not a score.*Did you mean 'shapes'",
    "stop_when.shapes.falls_by=0": "stop_when.shapes.falls_by: got 0.*greater than 0",
    "stop_when.shapes.fals_by=1": "stop_when.shapes: 'fals_by'.*Did you mean 'falls_by'",
    "watch.non_finite=warn": "watch.non_finite: got 'warn'.*'stop' or 'skip'",
    "watch.zero_gradient=skip": "watch.zero_gradient: got 'skip'.*'warn', 'stop' or 'ignore'",
    "watch.zero_varience=stop": "watch: 'zero_varience'.*Did you mean 'zero_variance'",
    "export=emma": "export: got 'emma'.*'live' or 'ema'",
    "optimizer.learning_rate={lora: 1e-3}": "optimizer.learning_rate: it names no rate for the adapter 'tokens'",
    "objectives.0.trains=[lora]": "adapters.tokens: no term trains it, and there is no `start_from`",
    "reference=start_from": "reference: 'start_from', but this recipe starts from nothing; add `start_from: RUN`",
    "reference=ema": "reference: got 'ema'.*'base' or 'start_from'",
    "combine=smu": "combine: 'smu' is not a combiner.*'sum'",
    "track=[tensorbord]": r"track\[0\]: 'tensorbord' is not a tracker.*'tensorboard'",
    "seed=!!python/name:os.system": "YAML tags .* are not allowed",
    "objectives.7.every=1": "objectives is a list of 2; '7' is not an index",
    "steps.more=1": "steps is 10, which has no 'more'",
    "steps": "write it as key.path=value",
}


@pytest.mark.parametrize("override", WRONG)
def test_each_mistake_is_reported_with_its_place_and_remedy(write, override):
    with pytest.raises(UserError, match=WRONG[override]):
        Recipe.from_yaml(write(), [override])


def test_a_frozen_adapter_needs_no_learning_rate(write):
    changes = ["start_from=runs/first", "objectives.0.trains=[lora]", "optimizer.learning_rate={lora: 1e-3}"]
    assert Recipe.from_yaml(write(), changes).optimizer.learning_rate == {"lora": 1e-3}


def test_a_rule_on_a_score_that_is_only_measured_at_the_end_is_refused(write):
    with pytest.raises(
        UserError, match="checkpoint.best: 'shapes' is not measured while the run goes on; set evaluate.e"
    ):
        Recipe.from_yaml(write(), ["checkpoint.best=shapes", "evaluate.every=null"])
    with pytest.raises(UserError, match="stop_when.strict: 'strict' is not measured"):
        Recipe.from_yaml(write(), ["stop_when.strict.falls_by=0.1", "evaluate=null"])


def test_two_terms_with_the_same_name_are_refused(write):
    with pytest.raises(UserError, match=r"objectives\[1\].name: 'first' is the name of another term"):
        Recipe.from_yaml(write(), ["objectives.0.name=first", "objectives.1.name=first"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "x.yaml: line 2: the key 'steps' is given twice, first in line 1"),
        ("steps: 1\nadapters: {lora: {use: lora}\n", "x.yaml: line 3: "),
        ("steps: !!python/object/apply:os.getcwd []\n", "x.yaml: line 1: YAML tags"),
        ("- a\n- b\n", "x.yaml: a recipe is a mapping.*list"),
        ("", "x.yaml: a recipe is a mapping.*empty"),
        ("a: &a [*a]\n", "x.yaml: "),
        ("steps: 1\n", "x.yaml: 3 mistakes:\n- backbone: this key is required"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_reported_with_the_line(write, text, message):
    with pytest.raises(UserError, match=message):
        Recipe.from_yaml(write(text))


def test_a_missing_file_is_reported_with_the_recipes_beside_it(write):
    path = write()
    with pytest.raises(UserError, match=r"y.yaml: no such recipe file. Recipes there: .*x.yaml"):
        Recipe.from_yaml(path.with_name("y.yaml"))


def test_a_tracker_that_is_not_installed_is_reported_with_the_command(write, monkeypatch):
    monkeypatch.setattr("agsm_rl.recipe.between_blocks.TRACKERS", {"wandb": "no_such_package_at_all"})
    with pytest.raises(UserError, match=r"track\[0\]: 'wandb' is not installed; run `pip install"):
        Recipe.from_yaml(write(), ["track=[wandb]"])


RECIPES = Path(__file__).parents[2] / "recipes"


# Sweeps have tests of their own (tests/sweep/test_plan.py).
SHIPPED = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml") if path.parent.name != "study")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_can_be_read(name, users_data):
    assert Recipe.from_yaml(RECIPES / name).steps > 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"), ("12:30", "12:30"), ("1:30.5", "1:30.5"), ("0", 0), ("-7", -7), ("1_000", 1000), ("0x10", 16),
        ("1.5", 1.5), (".5", 0.5), ("1e-3", 1e-3), ("1.0e-3", 1e-3), ("-.inf", -float("inf")), ("09", "09"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_mean_them(text, value):
    """YAML 1.1 reads 010 as 8 and 12:30 as 750."""
    (read,) = parse_yaml(f"[{text}]" if ":" not in text else f"- {text}", where="x")
    assert read == value and type(read) is type(value)


def test_a_message_repeats_the_beginning_of_a_long_override():
    with pytest.raises(UserError) as refused:
        apply_overrides({}, ["seed=" + "[" * 5000])
    assert str(refused.value).startswith("--set seed=[[[") and len(str(refused.value)) < 400
