"""From a sweep file to its cells: names, changes, budgets, starts; and the message for each mistake."""

from pathlib import Path

import pytest
import yaml
from sweep_parts import PAIRS, ROLLOUTS

from agsm_rl.errors import UserError
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.sweep.budget import images_taken
from agsm_rl.sweep.plan import make_plan

DDPO = {
    "sources": {"own": ROLLOUTS},
    "objectives": [{"use": "ddpo", "source": "own"}],
}
PREFERENCES = {"use": "preferences", "dataset": "builtin:shapes-preferences", "batch_size": 3}


def recipes_of(plan):
    return {cell.name: cell.recipe for cell in plan.cells}


def test_cells_are_all_combinations_seed_by_seed(plan):
    axes = {"objective": {"plain": {}, "half": {"objectives.0.weight": 0.5}}, "optimizer.learning_rate": [1e-3, 0.01]}
    made = plan(axes=axes, seeds=[3, 7])
    assert [cell.name for cell in made.cells][:4] == [
        "plain,learning_rate=0.001-seed3",
        "plain,learning_rate=0.01-seed3",
        "half,learning_rate=0.001-seed3",
        "half,learning_rate=0.01-seed3",
    ]
    assert len(made.cells) == 8
    last = made.cells[-1]
    assert (last.variant, last.seed, last.recipe.seed) == ("half,learning_rate=0.01", 7, 7)
    assert last.axes == {"objective": "half", "optimizer.learning_rate": 0.01}
    assert (last.recipe.objectives[0].weight, last.recipe.optimizer.learning_rate) == (0.5, 0.01)


def test_a_sweep_without_axes_is_the_recipe_over_its_seeds(plan):
    assert [cell.name for cell in plan(seeds=2).cells] == ["mine-seed0", "mine-seed1"]


def test_a_variant_replaces_whole_blocks_and_null_removes_a_key(plan):
    base_and_ddpo = {"base": {}, "ddpo": DDPO | {"checkpoint": None, "adapters.lora.rank": None}}
    recipes = recipes_of(plan(axes={"objective": base_and_ddpo}, set={"sample.num_images": 3}))
    assert [term.use for term in recipes["ddpo-seed0"].objectives] == ["ddpo"]
    assert recipes["ddpo-seed0"].checkpoint.every == 100  # the default
    assert recipes["ddpo-seed0"].adapters["lora"].options["rank"] == 8
    assert [term.use for term in recipes["base-seed0"].objectives] == ["score_matching"]
    assert recipes["base-seed0"].adapters["lora"].options["rank"] == 2
    assert {recipe.sample.num_images for recipe in recipes.values()} == {3}


def test_null_is_set_where_the_key_accepts_it(plan):
    recipes = recipes_of(plan(axes={"optimizer.max_grad_norm": [1.0, None]}))
    assert recipes["max_grad_norm=1-seed0"].optimizer.max_grad_norm == 1.0
    assert recipes["max_grad_norm=null-seed0"].optimizer.max_grad_norm is None


def test_a_variant_starts_from_the_cell_of_the_same_seed_and_other_axes(plan):
    axes = {"objective": {"first": {}, "then": {"start_from": "first"}}, "optimizer.learning_rate": [0.1, 0.2]}
    cells = {cell.name: cell for cell in plan(axes=axes, seeds=2).cells}
    then = cells["then,learning_rate=0.2-seed1"]
    assert then.after == "first,learning_rate=0.2-seed1"
    assert then.recipe.start_from == f"runs/mine/cells/{then.after}"
    assert cells[then.after].after is None


def test_a_variant_may_start_from_scratch_although_the_recipe_starts_from_a_run(plan):
    axes = {"start": {"after": {}, "scratch": {"start_from": None}}}
    cells = plan(axes=axes, set={"start_from": "before"}).cells
    assert [cell.recipe.start_from for cell in cells] == ["before", None]


def test_variants_may_be_called_low_and_high(plan):
    axes = {"rate": {name: {"optimizer.learning_rate": value} for name, value in (("low", 1e-4), ("high", 1e-3))}}
    assert [cell.variant for cell in plan(axes=axes).cells] == ["low", "high"]


def test_a_variant_may_add_an_adapter_to_those_it_starts_from(plan):
    tokens = {"start_from": "first", "adapters.tokens": {"use": "soft_tokens"}, "objectives.0.trains": ["tokens"]}
    cell = plan(axes={"objective": {"first": {}, "then": tokens}}).cells[1]
    assert list(cell.recipe.adapters) == ["lora", "tokens"]


def test_the_resolved_sweep_is_the_same_sweep(plan, tmp_path):
    axes = {"objective": {"ramp": {"objectives.0.weight": {0: 0.0, 2: 1.0}}, "ddpo": DDPO}}
    original = plan(axes=axes, seeds=2, budget={"images": 64}, set={"sample.num_images": 3})
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(original.to_data()))
    again = make_plan(str(resolved))
    assert again.name == "mine"
    assert recipes_of(again) == recipes_of(original)
    assert again.evaluations == original.evaluations


@pytest.mark.parametrize(
    ("objectives", "images", "steps"),
    [
        ([{"use": "score_matching", "source": PAIRS}], 41, 10),
        # Four images a draw, from which two steps learn: ten draws.
        ([{"use": "ddpo", "source": "own"}], 40, 20),
        # Shared rollouts count once.
        ([{"use": "ddpo", "source": "own"}, {"use": "diffusion_nft", "source": "own"}], 40, 20),
        # Steps 0 and 3 take four pairs and a draw, the others four pairs.
        ([{"use": "score_matching", "source": PAIRS}, {"use": "ddpo", "source": "own", "every": 3}], 24, 5),
        # Two images a preference.
        ([{"use": "diffusion_dpo", "source": PREFERENCES}], 24, 4),
        # Nothing before the offset, or while the weight is 0.
        ([{"use": "score_matching", "source": PAIRS, "offset": 5}], 8, 7),
        ([{"use": "score_matching", "source": PAIRS, "weight": {0: 0.0, 2: 0.0, 4: 1.0}}], 8, 5),
    ],
)
def test_a_budget_in_images_sets_the_number_of_steps(plan, recipe, objectives, images, steps):
    variant = {"sources": {"own": ROLLOUTS}, "objectives": objectives}
    [cell] = plan(axes={"a": {"one": variant}}, budget={"images": images}).cells
    assert cell.recipe.steps == steps
    assert images_taken(cell.recipe, steps) <= images < images_taken(cell.recipe, steps + 1)


def test_a_variant_may_have_a_share_of_the_budget(plan):
    axes = {"a": {"half": {"budget_share": 0.5}, "whole": {}}}
    assert [cell.recipe.steps for cell in plan(axes=axes, budget={"steps": 10}).cells] == [5, 10]
    assert [cell.recipe.steps for cell in plan(axes=axes, budget={"images": 40}).cells] == [5, 10]
    assert [cell.seconds for cell in plan(axes=axes, budget={"seconds": 10}).cells] == [5.0, 10.0]


def test_an_axis_may_be_called_like_a_key_that_the_sweep_decides(plan):
    axes = {"seed": {"of_the_lora": {"adapters.lora.seed": 3}}, "steps": {"usual": {}}}
    [cell] = plan(axes=axes, budget={"steps": 10}).cells
    assert (cell.recipe.seed, cell.recipe.adapters["lora"].options["seed"], cell.recipe.steps) == (0, 3, 10)


def test_the_held_out_evaluation_is_the_one_that_is_reported(plan):
    made = plan()
    assert made.reported.split == "held_out"
    assert made.cells[0].recipe.evaluate == made.reported


def test_a_sweep_without_evaluations_uses_those_of_its_recipe(plan, recipe):
    recipe["evaluate"] = {"every": 1, "num_images": 5, "split": "validation"}
    [evaluation] = plan(evaluate=None).evaluations
    assert (evaluation.num_images, evaluation.every) == (5, None)


LIST_OF_BLOCKS = {"objectives.0": [{"use": "agsm"}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, r"mine.yaml: 'axis' is not an option here.*Did you mean 'axes'"),
        ({"axes": {"steps": 3}}, r"axes.steps: got 3; an axis is a list of values, named variants"),
        ({"axes": {"steps": []}}, r"axes.steps: got \[\]; an axis is"),
        ({"axes": LIST_OF_BLOCKS}, r"axes.objectives.0: a list may contain numbers.*name the variants"),
        ({"axes": {"a": {"b c": {}}}}, r"axes.a.b c: a variant's name may contain"),
        ({"axes": {"a": {"b": 3}}}, r"axes.a.b: got 3; a variant is a mapping"),
        ({"axes": {"a": {"b": {"budget_share": 2}}}}, r"a.b.budget_share: got 2; give a number in \(0, 1\]"),
        ({"axes": {"a": {"b": {5: 1}}}}, r"axes.a.b: got the key 5; a key is a dotted path"),
        ({"axes": {"a": {"b": {"start_from": ["c"]}}}}, r"a.b.start_from: got \['c'\]; give a variant's name"),
        ({"axes": {"a": {"b": {"steps": 0}}}}, r"cell 'b-seed0': steps: got 0"),
        ({"axes": {"a": {"b": {"objectives.0.use": "agms"}}}}, r"cell 'b-seed0': objectives\[0\].use: 'agms'.*'agsm'"),
        (
            {"axes": {"a": {"b": {"objectives.3.use": "agsm"}}}},
            r"cell 'b-seed0': objectives.3.use: objectives is a list",
        ),
        (
            {"axes": {"a": {"b": {"adapters.tokens": None}}}},
            r"'b-seed0': adapters.tokens: there is no.*there are: lora",
        ),
        ({"axes": {"steps": [1, 1]}}, r"axes: two cells would be named 'steps=1-seed0'"),
        ({"axes": {"a": {"b": {"start_from": "c"}}}}, r"cell 'b-seed0': start_from: 'c' is not a variant.*allowed: b"),
        ({"axes": {"a": {"b": {"start_from": "b"}}}}, r"cell 'b-seed0': start_from: 'b' would start from itself"),
        (
            {"axes": {"a": {"b": {"start_from": "c"}, "c": {"start_from": "b"}}}},
            r"forms a cycle: b-seed0 -> c-seed0 -> b",
        ),
        (
            {"axes": {"a": {"b": {}, "c": {"start_from": "b", "adapters.lora.rank": 4}}}},
            r"cell 'c-seed0': start_from: its adapter 'lora' is .*'rank': 4.*that of 'b-seed0' is .*'rank': 2",
        ),
        (
            {"axes": {"a": {"b": {}, "c": {"start_from": "b", "adapters": {"lroa": {"use": "lora", "rank": 2}}}}}},
            r"cell 'c-seed0': start_from: b-seed0: holds no adapter 'lroa'; it holds: lora",
        ),
        ({"axes": {"seed": [1, 2]}}, r"mine.yaml: axes.seed: got \[1, 2\], but the seeds of .*the sweep's own `seeds`"),
        ({"axes": {"a": {"b": {"seed": 7}}}}, r"axes.a.b.seed: got 7, but the seeds of all cells are .*`seeds`"),
        ({"set": {"seed": 7}}, r"mine.yaml: set.seed: got 7, but the seeds of all cells are the sweep's own `seeds`"),
        (
            {"axes": {"seed": {"low": 1, "high": 5}}, "search": {"trials": 1}},
            r"axes.seed: got \{'low': 1, 'high': 5\}, but the seeds",
        ),
        (
            {"axes": {"steps": [100, 200]}, "budget": {"steps": 50}},
            r"axes.steps: got \[100, 200\], but `budget: \{steps: 50\}` decides.*leave one of the two out",
        ),
        (
            {"axes": {"a": {"b": {"steps": 100}}}, "budget": {"images": 50}},
            r"axes.a.b.steps: got 100, but `budget: \{images: 50\}` decides",
        ),
        (
            {"set": {"steps": 9}, "budget": {"seconds": 1.5}},
            r"set.steps: got 9, but `budget: \{seconds: 1.5\}` decides",
        ),
        (
            {"axes": {"a": {"b": {"budget_share": 0.5}}}},
            r"axes.a.b.budget_share: got 0.5, but there is no budget to share; add `budget: ",
        ),
        ({"seeds": 0}, r"seeds: got 0"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] lists a seed twice"),
        (
            {"budget": {"steps": 3, "images": 3}},
            r"budget: a budget is one of steps, images or seconds; got steps, images",
        ),
        (
            {"budget": {"images": 3}},
            r"cell 'mine-seed0': budget.images: 3 is too few for a single step; the first one takes 4",
        ),
        (
            {"set": {"objectives.0.weight": 0}, "budget": {"images": 9}},
            r"budget.images: the recipe never takes more than 0 images",
        ),
        ({"set": {"objectives.0.source": "own"}}, r"cell 'mine-seed0': objectives\[0\].source: 'own' is not a source"),
        ({"evaluate": None}, r"evaluate: nothing is evaluated"),
        ({"evaluate": {"split": "test"}}, r"evaluate\[0\].*split: got 'test'"),
        ({"evaluate": [{}, {}]}, r"evaluate\[1\].split: 'held_out' is listed twice"),
        ({"evaluate": {"every": 5}}, r"evaluate\[0\].every: a sweep evaluates finished cells only"),
        ({"evaluate": {"rewards": ["shape"]}}, r"evaluate\[0\].rewards\[0\]: 'shape' is not a reward.*'shapes'"),
        (
            {"recipe": "none.yaml"},
            r"mine.yaml: recipe: none.yaml: no such recipe file.*relative to the folder of the sweep",
        ),
        ({"recipe": "builtin:agms"}, r"'builtin:agms' is not a shipped recipe.*'builtin:agsm'"),
        ({"axes": {"steps": {"low": 1, "high": 5}}}, r"axes.steps is a range; add `search"),
        ({"search": {"trials": 3}}, r"search: no axis is a range"),
        (
            {"axes": {"steps": {"low": 5, "high": 1}}, "search": {"trials": 1}},
            r"axes.steps: `low` must be less than `high`",
        ),
        ({"search": {"trials": 1, "split": "held_out"}}, r"search: `split: held_out` is for the report alone"),
        (
            {"axes": {"steps": {"low": 1, "high": 5}}, "search": {"trials": 1, "guidance": 3.0}},
            r"search.guidance: 3 is not evaluated on validation; choose one of 1",
        ),
        (
            {"axes": {"steps": {"low": 0, "high": 5}}, "search": {"trials": 1}},
            r"cell 'steps=0-seed0': steps: got 0",
        ),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(plan, changes, message):
    with pytest.raises(UserError, match=message):
        plan(**changes)
    assert not Path("runs").exists()


def test_a_recipe_given_as_a_sweep_is_refused_and_the_other_way_round(write, recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="recipe.yaml: is a recipe.*agsm-rl train"):
        make_plan("recipe.yaml")
    with pytest.raises(UserError, match="mine.yaml: is a sweep.*agsm-rl sweep"):
        Recipe.from_yaml(write(axes={"steps": [1]}))
    with pytest.raises(UserError, match="no.yaml: no such sweep file"):
        make_plan("no.yaml")


SWEEPS = Path(__file__).parents[2] / "recipes" / "study"


@pytest.mark.parametrize("name", sorted(path.stem for path in SWEEPS.glob("*.yaml")))
def test_every_shipped_sweep_can_be_read(name):
    assert make_plan(str(SWEEPS / f"{name}.yaml")).cells


TOO_LARGE = {
    "seeds: got 1000000000": {"seeds": 10**9},
    "seeds: got 10001": {"seeds": 10_001},
    "10,010 cells": {"seeds": list(range(5005)), "axes": {"steps": [1, 2]}},
    "100,000,000,000,000,000,000 cells": {"axes": {f"optimizer.a{n}": list(range(100)) for n in range(10)}},
    "search.trials: got 1000000": {"search": {"trials": 10**6}, "axes": {"steps": {"low": 1, "high": 2}}},
    r"101 .search.trials. × 100 .seeds. are 10,100 cells": {
        "search": {"trials": 101},
        "seeds": 100,
        "axes": {"steps": {"low": 1, "high": 2}},
    },
}


@pytest.mark.parametrize("message", TOO_LARGE)
def test_a_sweep_of_too_many_cells_is_refused_before_any_is_made(plan, monkeypatch, message):
    monkeypatch.setattr("agsm_rl.sweep.plan.make_cell", lambda *_: pytest.fail("a cell was made"))
    with pytest.raises(UserError, match=message):
        plan(**TOO_LARGE[message])
