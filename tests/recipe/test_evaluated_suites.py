"""The suites of a recipe's `evaluate`: the long form and the short, what is refused, and what rules may name."""

import json
import shutil

import pytest

from agsm_rl.errors import UserError
from agsm_rl.recipe.earlier import evaluation_of_today, recipe_of_today
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.recipe.suites import find_score, make_suites
from agsm_rl.shapes.train_base.text import make_tokenizer

PARTS = Parts(where="recipe.yaml")
MINE = {"use": "rewards", "prompts": "builtin:shapes-prompts", "rewards": ["sharpness"], "num_images": 3}
FOREIGN = "owner/a-model-of-photographs"


def recipe(evaluate, checkpoint="builtin:shapes-sd15", **changes):
    content = {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(checkpoint)},
        "adapters": {"lora": {"use": "lora"}},
        "objectives": [{"use": "score_matching", "source": {"use": "pairs", "dataset": "builtin:shapes"}}],
        "evaluate": evaluate,
    }
    return Recipe.from_data(content | changes)


def test_the_long_form_is_completed_and_read_back_the_same():
    suites = {"mine": MINE, "toy": {"use": "shapes", "rewards": {"light": {"use": "brightness"}}}}
    read = recipe({"suites": suites, "guidance": 2, "split": "validation", "seed": 3})
    data = read.to_data()["evaluate"]
    assert "suite" not in data and "num_images" not in data and data["guidance"] == [2.0]
    assert data["suites"]["toy"]["num_images"] == 600 and data["suites"]["mine"]["final_only"] is False
    assert Recipe.from_data(read.to_data()) == read and recipe_of_today(read.to_data(), where="stored") == read
    mine, toy = make_suites(read.evaluate, PARTS)
    assert mine.full_names() == ["mine/sharpness"]
    assert toy.full_names() == ["toy/overall", "toy/strict", "toy/light"]
    assert (toy.suite.split, toy.suite.seed) == ("validation", 3)  # those of the evaluation
    assert mine.suite.list.split == "validation"  # what is chosen on validation never looks at held-out prompts


def test_a_builtin_list_may_have_a_split_of_its_own_and_a_file_has_none(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\n")
    suites = {"own": MINE | {"prompt_split": "train"}, "file": MINE | {"prompts": str(tmp_path / "prompts.txt")}}
    own, file = make_suites(recipe({"suites": suites, "split": "validation"}).evaluate, PARTS)
    assert (own.suite.list.split, file.suite.list.split) == ("train", None)


def test_a_suite_that_is_null_is_left_out():
    assert list(recipe({"suites": {"mine": MINE, "toy": None}}).evaluate.suites) == ["mine"]


def test_beside_another_mistake_a_suite_s_rewards_are_not_called_missing():
    with pytest.raises(UserError, match="evaluat") as told:
        recipe({"suites": {"mine": MINE}}, evaluat=1)
    assert "missing" not in str(told.value)


def test_the_short_form_is_one_suite_and_is_stored_as_before():
    read = recipe({"num_images": 5, "rewards": ["shapes"], "split": "train"})
    assert "suites" not in read.to_data()["evaluate"] and read.to_data()["evaluate"]["suite"] == "shapes"
    (entry,) = make_suites(read.evaluate, PARTS)
    assert (entry.name, entry.suite.num_images, entry.suite.split) == ("shapes", 5, "train")
    assert entry.full_names() == ["overall", "strict", "shapes"]
    assert list(entry.suite.prompts()) == list(range(5))


def test_a_stored_suite_that_lacks_a_newer_option_means_what_it_meant():
    stored = Evaluate.model_validate({"suites": {"toy": {"use": "shapes"}}}).model_dump(mode="json")
    assert set(stored["suites"]["toy"]) == {"use", "rewards", "final_only"}
    suites = evaluation_of_today(stored, PARTS).suites
    assert suites["toy"].options == {"split": None, "num_images": 600, "seed": None, "any_base": False}


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"suites": {}}, r"evaluate.suites: .*at least 1"),
        ({"suites": {"mine": MINE}, "num_images": 3}, "evaluate: 'num_images' belongs to the short form"),
        ({"suite": "geneval"}, r"evaluate.suite: 'geneval'.*suites: \{geneval: \{use: geneval, …\}\}"),
        ({"suites": {"mine": MINE | {"use": "reward"}}}, "mine.use: 'reward' is not a suite.*mean 'rewards'"),
        ({"suites": {"mine": MINE | {"prompt": "x"}}}, "mine: 'prompt' is not an option.*mean 'prompt"),
        ({"suites": {"mine": MINE | {"rewards": []}}}, "suites.mine: the suite 'rewards' measures rewards; add e.g."),
        ({"suites": {"mine": MINE | {"rewards": {"sharpness": 1.0}}}}, "rewards are only measured here"),
        ({"suites": {"mine": MINE | {"rewards": ["sharpnes"]}}}, r"rewards\[0\]: 'sharpnes' is not a reward"),
        ({"suites": {"mine": MINE | {"num_images": 0}}}, "mine.num_images: got 0"),
        ({"suites": {"mine": MINE | {"prompts": "./nowhere.txt"}}}, "mine.prompts.*nowhere.txt"),
        ({"suites": {"a/b": MINE}}, "'a/b' is not a valid name"),
        ({"suites": {"mine": MINE | {"prompts": None}}}, "suites.mine: .*no prompts; give a file"),
        ({"suites": {"fid": {"use": "fid"}}}, "suites.fid.reference: this key is required"),
        (
            {"suites": {"toy": {"use": "shapes", "rewards": {"strict": {"use": "shapes"}}}}},
            "toy.rewards.strict: this is the name of one of the suite's own scores",
        ),
    ],
)
def test_a_suite_that_cannot_be_is_refused_by_its_place(evaluate, message):
    with pytest.raises(UserError, match=message):
        recipe(evaluate)


def test_a_bare_score_is_the_first_suite_s_or_that_of_the_only_suite_which_has_it():
    suites = make_suites(
        Evaluate.model_validate(
            {
                "suites": {
                    "mine": MINE,
                    "other": MINE | {"rewards": ["sharpness", "brightness"]},
                    "toy": {"use": "shapes"},
                    "toy_2": {"use": "shapes"},
                }
            }
        ),
        PARTS,
    )
    names = {name: find_score(name, suites, where="x") for name in ("sharpness", "brightness", "toy/strict")}
    assert names == {"sharpness": "mine/sharpness", "brightness": "other/brightness", "toy/strict": "toy/strict"}
    with pytest.raises(UserError, match="'strict' is not a score"):
        find_score("strict", suites, where="x")


def test_the_shapes_suite_is_refused_on_a_base_of_another_world_with_what_to_write_instead(tmp_path):
    for evaluate in ({"num_images": 3}, {"suites": {"toy": {"use": "shapes"}}}):
        with pytest.raises(UserError, match=r"evaluate.*was not trained on it.*use: rewards, prompts: prompts.txt"):
            recipe(evaluate, FOREIGN)
    assert recipe({"suites": {"toy": {"use": "shapes", "any_base": True}}}, FOREIGN)
    assert recipe({"suites": {"mine": MINE}}, FOREIGN)


def test_a_copy_of_a_base_of_the_world_is_known_by_its_vocabulary(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "copy" / "tokenizer")
    recipe({"num_images": 3}, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", tmp_path / "old")
    vocabulary = json.loads((tmp_path / "old/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "old/tokenizer/tokenizer.json").unlink()
    (tmp_path / "old/tokenizer/vocab.json").write_text(json.dumps(vocabulary))  # as transformers 4 writes it
    recipe({"num_images": 3}, tmp_path / "old")
    foreign = {f"word{index}</w>": index for index in range(49408)}
    (tmp_path / "old/tokenizer/vocab.json").write_text(json.dumps(vocabulary | foreign))
    with pytest.raises(UserError, match="was not trained on it"):
        recipe({"num_images": 3}, tmp_path / "old")
