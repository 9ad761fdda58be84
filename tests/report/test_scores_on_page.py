"""What a report says of scores equals what the run folders hold."""

import json
from statistics import mean

import pytest
from making_runs import TAGS, by_geneval, write_run
from reading_pages import entries, page, share


def test_every_score_equals_the_mean_over_tags_and_seeds_of_the_verdicts(sweep):
    found = page(sweep).suite["estimates"]
    assert len(found) == 2 * 2 * 3  # verdicts, guidances, models
    for one in found:
        name = "weak" if one["base"] else one["model"]
        runs = [entries(sweep / "cells" / f"{name}-seed{seed}")[one["guidance"]] for seed in (0, 1)]
        scores = [share(run["base"] if one["base"] else run, one["score"]) for run in runs]
        assert one["overall"][0] == pytest.approx(mean(scores), abs=1e-6)
        assert one["by_seed"] == pytest.approx(scores[: 1 if one["base"] else 2], abs=1e-6)


def test_every_difference_equals_that_of_the_verdicts_image_by_image(sweep):
    found = page(sweep).suite["differences"]
    assert len(found) == 2 * 2 * 3  # verdicts, guidances, pairs of models
    for one in found:
        by_seed = []
        for seed in (0, 1):
            trained = entries(sweep / "cells" / f"{one['model']}-seed{seed}")[one["guidance"]]
            other = entries(sweep / "cells" / f"{one['minus'] if not one['base'] else one['model']}-seed{seed}")
            other = other[one["minus_guidance"]]
            by_seed.append(share(trained, one["score"]) - share(other["base"] if one["base"] else other, one["score"]))
        assert one["by_seed"] == pytest.approx(by_seed, abs=2e-6)
        value, low, high = one["overall"]
        assert value == pytest.approx(mean(by_seed), abs=2e-6) and low <= value <= high


def test_with_one_seed_the_report_has_eval_jsons_scores_and_says_that_intervals_are_over_requirements(tmp_path):
    kinds = [f"{number} {name}" for number in ("two", "three", "four") for name in ("red stars", "stars", "circles")]
    prompts = [f"{wording}{kind}" for wording in ("", "a photo of ") for kind in kinds]
    run = write_run(tmp_path / "mine", prompts=prompts, scores={1.0: (0.3, 0.6)})
    content = json.loads((run / "eval.json").read_text())
    # As watching.py adds it; written here from the verdicts alone.
    found = page(run)
    (strict,) = [one for one in found.suite["estimates"] if one["score"] == "strict" and not one["base"]]
    kept = content["strict"]
    assert strict["overall"][0] == pytest.approx(kept["overall"], abs=1e-6)
    for tag, row in kept["tags"].items():
        value, low, high = strict["tags"][tag]
        assert value == pytest.approx(row["score"], abs=1e-6) and 0 <= low <= value <= high <= 1
    assert "18 held-out prompts (9 requirements)" in found.text
    assert "1 training seed" in found.text and "over requirements only" in found.text
    told = f"from {100 * content['base']['strict']['overall']:.1f} to {100 * kept['overall']:.1f} %"
    assert f" the share of images that are exactly right {told}" in found.text


def test_prompts_outside_the_drawn_worlds_count_by_themselves(tmp_path):
    text = page(write_run(tmp_path / "mine", prompts=["a bench", "a dog on a bench"] * 9)).text
    assert "over prompts only" in text and "requirements" not in text.partition("training seed")[0]


def test_without_validation_no_guidance_is_called_best_and_all_are_shown(sweep):
    found = page(sweep)
    assert [view["key"] for view in found.suite["views"]] == ["1", "2"]
    assert "No guidance is called the best" in found.text
    assert "guidance 1" in found.text and "guidance 2" in found.text


def test_each_models_guidance_is_chosen_on_the_validation_prompts_alone(tmp_path):
    # On the held-out prompts 2 is better for the trained model; on validation, 1 is. The base's own is 2.
    scores, chosen = {1.0: (0.3, 0.5), 2.0: (0.4, 0.7)}, {1.0: (0.2, 0.8), 2.0: (0.6, 0.5)}
    run = write_run(tmp_path / "mine", scores=scores, validation=chosen)
    found = page(run)
    own = found.suite["views"][0]
    assert own["key"] == "own" and own["guidance"] == {"base": 2.0, "variants": {"mine": 1.0}}
    (change,) = [
        one
        for one in found.suite["differences"]
        if (one["score"], one["guidance"], one["minus_guidance"]) == ("strict", 1.0, 2.0)
    ]
    measured = entries(run)
    assert change["overall"][0] == pytest.approx(share(measured[1.0]) - share(measured[2.0]["base"]), abs=2e-6)
    assert "prompts, mine (at guidance 1, the base at 2)" in found.text


def test_a_leader_is_named_by_the_validation_prompts_not_by_these(tmp_path):
    same = {1.0: (0.3, 0.5)}
    one = write_run(tmp_path / "lucky", scores={1.0: (0.3, 0.7)}, validation=same)
    other = write_run(tmp_path / "better", scores=same, validation={1.0: (0.3, 0.7)}, rank=4)
    assert page(one, other).text.count("On held-out prompts, better (at guidance 1, the base at 1) raises") == 1


@pytest.mark.parametrize("how", [{"split": "train"}, {"seed": 3}, {"prompt_suffix": ", verified"}])
def test_no_guidance_is_chosen_where_validations_are_not_alike(tmp_path, how):
    same = {1.0: (0.3, 0.5), 2.0: (0.3, 0.6)}
    one = write_run(tmp_path / "one", scores=same, validation=same)
    other = write_run(tmp_path / "other", scores=same, validation=same, rank=4)
    assert page(one, other).suite["views"][0]["key"] == "own"
    content = json.loads((other / "eval-validation.json").read_text())
    (other / "eval-validation.json").write_text(json.dumps(content | how))
    found = page(one, other)
    assert [view["key"] for view in found.suite["views"]] == ["1", "2"]
    assert "because the runs' own were not alike" in found.text


def test_runs_of_one_recipe_are_one_variant_over_seeds(tmp_path):
    runs = [write_run(tmp_path / f"agsm-seed{seed}", seed=seed) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "ddpo", terms=("ddpo",)))
    found = page(*runs)
    assert [(one["name"], one["seeds"]) for one in found.data["variants"]] == [("agsm", [0, 1]), ("ddpo", [0])]
    change = next(one for one in found.suite["differences"] if not one["base"])
    assert len(change["by_seed"]) == 1  # only seed 0 is common


def test_the_first_screen_names_the_text_appended_to_the_prompts(tmp_path):
    run = write_run(tmp_path / "agsm-seed0")
    content = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(content | {"prompt_suffix": ", verified"}))
    assert "prompts with “, verified” appended, the same noise" in page(run).text


def test_what_geneval_judged_is_compared_as_the_own_suite_is(tmp_path):
    runs = [
        by_geneval(write_run(tmp_path / f"mine-seed{seed}", seed=seed), trained=0.8, seed=seed) for seed in (0, 1)
    ] + [by_geneval(write_run(tmp_path / "other-seed0", rank=4), trained=0.5, seed=2)]
    found = page(*runs)
    assert found.suite["scores"] == {"correct": {"label": "right (by GenEval's rules)", "share": True}}
    assert "96 images of 24 GenEval prompts" in found.text
    scores = {one["model"]: one["overall"][0] for one in found.suite["estimates"]}
    contents = [json.loads((run / "eval.json").read_text()) for run in runs]
    assert scores["mine"] == pytest.approx(mean(content["overall"] for content in contents[:2]), abs=1e-6)
    assert scores["other"] == pytest.approx(contents[2]["overall"], abs=1e-6)
    # One prompt of each tag after the other, so that pictures show all tags.
    assert [row["tag"] for row in found.suite["pictures"]["prompts"][:6]] == list(TAGS)
    assert all(found.suite["pictures"]["shown"]["4"]["variants"]["mine"])
