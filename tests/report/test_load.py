"""Run folders as a report reads them: which are one variant, and which cannot be compared."""

import json
import os

import pytest
import yaml
from making_runs import evaluation, not_evaluated, write_run, write_sweep

from agsm_rl.errors import UserError
from agsm_rl.report.load import load
from agsm_rl.report.page import render


def test_a_chains_runs_are_one_variant_where_each_goes_on_from_its_own_seed(tmp_path):
    runs = [write_run(tmp_path / f"then-seed{seed}", seed=seed) for seed in (0, 1, 2)]
    for run, start in zip(runs, (0, 1, 0), strict=True):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"start_from": f"cells/first-seed{start}"}))
    found = load(runs)
    # The third continues from another seed's run: it is something else, which only shares the name.
    named = [(one.name, one.seeds) for one in found.variants]
    assert named == [("then", (0, 1)), ("then (2)", (2,))]


def test_a_run_from_before_an_option_existed_is_of_the_same_variant_as_one_with_its_first_default(tmp_path):
    runs = [write_run(tmp_path / f"agsm-seed{seed}", seed=seed) for seed in (0, 1, 2)]
    for run, later in zip(runs, ({}, {"reference": "base"}, {"reference": "start_from"}), strict=True):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | later))
    assert [(one.name, one.seeds) for one in load(runs).variants] == [("agsm", (0, 1)), ("agsm (2)", (2,))]


def test_a_run_that_was_drawn_with_the_negative_bank_is_another_variant(tmp_path):
    runs = [write_run(tmp_path / name / "agsm-seed0") for name in ("plain", "negative")]
    content = json.loads((runs[1] / "eval.json").read_text())
    (runs[1] / "eval.json").write_text(json.dumps(content | {"bank": "negative"}))
    assert [one.name for one in load(runs).variants] == ["agsm", "agsm (2)"]


def test_a_sweeps_cell_of_one_seed_has_the_variants_name(tmp_path):
    runs = [write_run(tmp_path / "agsm-seed3", seed=3), write_run(tmp_path / "run-seed0", seed=1, rank=4)]
    assert [one.name for one in load(runs).variants] == ["agsm", "run-seed0"]


def changed(run, **how):
    content = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(content | how))
    return run


def remade(run, prompts, **how):
    (run / "eval.json").write_text(json.dumps(evaluation(prompts, {1.0: (0.3, 0.5)}, 0, **how)))
    return run


UNPAIRED = {
    "different splits .held_out and validation": lambda run: changed(run, split="validation"),
    "different noise seeds .0 and 5": lambda run: changed(run, seed=5),
    "different numbers of images .60 and 12": lambda run: remade(run, [f"other {i}" for i in range(12)]),
    "different prompts, so": lambda run: remade(run, [f"other {i}" for i in range(60)]),
    "different numbers of sampling steps .20 and 50": lambda run: changed(run, num_steps=50),
    "different prompt suffixes .“” and “, verified”": lambda run: changed(run, prompt_suffix=", verified"),
    "no common guidance .*1.*: 4": lambda run: changed(run, guidance=4.0),
}


@pytest.mark.parametrize("message", UNPAIRED)
def test_runs_whose_images_are_no_pairs_are_refused_by_name(message, tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", rank=4)
    UNPAIRED[message](other)
    with pytest.raises(UserError, match=message) as refused:
        load([one, other])
    assert str(one) in str(refused.value) and str(other) in str(refused.value)


def test_runs_on_other_bases_are_refused(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("shapes-sd15", "shapes-sd3"))
    with pytest.raises(UserError, match="different bases .builtin:shapes-sd15 and builtin:shapes-sd3"):
        load([one, other])


@pytest.mark.parametrize("option", [{"lora": "mine.safetensors"}, {"unet": "other"}, {"t5_length": 77}])
def test_what_else_makes_a_base_is_part_of_it_and_how_it_is_computed_is_not(tmp_path, option):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", rank=4)
    content = yaml.safe_load((other / "recipe.yaml").read_text())
    how = {"device": "cpu", "dtype": "bfloat16", "compile": "default", "unet": None}
    (other / "recipe.yaml").write_text(yaml.safe_dump(content | {"backbone": content["backbone"] | how}))
    assert len(load([one, other]).variants) == 2
    (other / "recipe.yaml").write_text(yaml.safe_dump(content | {"backbone": content["backbone"] | option}))
    (key,) = option
    with pytest.raises(UserError, match=f"different bases .builtin:shapes-sd15 and builtin:shapes-sd15, {key}: "):
        load([one, other])


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["lr0.1-seed0", "lr0.1-seed1"], "lr0.1"),
        (["agsm_t10-0", "agsm_t10-1"], "agsm_t10"),
        (["sd15_s0", "sd15_s1"], "sd15"),
        (["tokens first", "tokens second"], "tokens"),
        (["2024-01-15_12-30-45_x", "2024-01-15_12-31-02_y"], "2024-01-15_12-3"),
        (["first", "second"], "agsm + ddpo"),
    ],
)
def test_runs_over_seeds_are_named_by_what_is_left_without_them(tmp_path, names, shared):
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(names)]
    assert [one.name for one in load(runs).variants] == [shared]


def test_an_evaluation_on_validation_prompts_must_be_of_what_the_run_came_to(tmp_path):
    run = write_run(tmp_path / "one", validation={1.0: (0.3, 0.5)})
    content = json.loads((run / "eval-validation.json").read_text())
    (run / "eval-validation.json").write_text(json.dumps(content | {"drawing": {"adapters": {"a.safetensors": "0"}}}))
    (run / "adapter").mkdir()
    (run / "adapter" / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="eval-validation.json: .*a.safetensors has changed since"):
        load([run])


def test_a_run_that_was_not_evaluated_is_not_compared_with_one_that_was(tmp_path):
    one, other = write_run(tmp_path / "one"), not_evaluated(write_run(tmp_path / "other", rank=4))
    with pytest.raises(UserError, match="other: was not evaluated, but .*one was"):
        load([one, other])


def test_one_run_given_twice_is_refused(tmp_path):
    run = write_run(tmp_path / "one")
    with pytest.raises(UserError, match="same recipe with the same seed"):
        load([run, run])


NOTHING = [{"prompt": "a drawing", "tag": "counting"}]

BROKEN = {
    "there is no such folder": lambda run: run / "nowhere",
    "is neither a run folder": lambda run: (run / "recipe.yaml").unlink() or run,
    "has no eval.json: the run is not finished": lambda run: (run / "eval.json").unlink() or run,
    "is not JSON": lambda run: (run / "eval.json").write_text("{") and run,
    "is not an evaluation as": lambda run: (run / "eval.json").write_text("[]") and run,
    "neither a verdict nor a score": lambda run: changed(run, images=NOTHING, base={"images": NOTHING}),
    "does not measure the base at every guidance": lambda run: without_a_base(run),
    "a verdict is true or false": lambda run: changed(run, images=[{"prompt": "", "tag": "", "strict": 1}]),
    "metrics.jsonl: line 1: is not JSON": lambda run: (run / "metrics.jsonl").write_text("?\n{}\n") and run,
    "metrics.jsonl: line 1 is not a line of a run's metrics": lambda run: first_line(run, b'{"step": Infinity}'),
    "metrics.jsonl: line 1 is not .*UnicodeDecodeError": lambda run: first_line(run, b'{"step": 1, "\xff": 1}'),
    "evaluations.jsonl: line 1 is not": lambda run: first_line(run, b'{"step": true}', "evaluations.jsonl"),
    "metrics.jsonl: line 1: is nested": lambda run: first_line(run, b"[" * 100_000),
    "metrics.jsonl: is not a regular file": lambda run: pipe(run, "metrics.jsonl"),
    "eval.json: is not a regular file": lambda run: pipe(run, "eval.json"),
    "recipe.yaml: is not a regular file": lambda run: pipe(run, "recipe.yaml"),
    "eval.json: this must be a file, but it is a folder": lambda run: folder(run, "eval.json"),
    "metrics.jsonl: this must be a file, but it is a folder": lambda run: folder(run, "metrics.jsonl"),
    "adapter: this must be a folder": lambda run: (run / "adapter").write_text("") and run or run,
    "sweep.json: is not a regular file": lambda run: os.mkfifo(run / "sweep.json") or run,
    "eval.json: is a link out of its folder": lambda run: link_out(run, "eval.json"),
    "metrics.jsonl: is a link out of its folder": lambda run: link_out(run, "metrics.jsonl"),
    "recipe.yaml: is a link out of its folder": lambda run: link_out(run, "recipe.yaml"),
    "evaluations.jsonl: is a link out of its folder": lambda run: link_out(run, "evaluations.jsonl"),
    "eval-validation.json: is a link out of its folder": lambda run: link_out(run, "eval-validation.json"),
    "adapter: is a link out of its folder": lambda run: link_out(run, "adapter"),
    "sweep.json: is a link out of its folder": lambda run: link_out(run, "sweep.json"),
    "recipe.yaml: seed: got nothing": lambda run: recipe_with(run, seed=None),
    "recipe.yaml: backbone: ": lambda run: recipe_with(run, backbone="sd15"),
    "eval.json: is nested too deeply": lambda run: (run / "eval.json").write_text("[" * 100_000) and run,
    "eval.json: is not text in UTF-8": lambda run: (run / "eval.json").write_bytes(b"\x89PNG\xff") and run,
    "nan is not a guidance": lambda run: changed(run, guidance=float("nan")),
    "OverflowError": lambda run: changed(run, num_steps=float("inf")),
    "different scores": lambda run: without_strict_in_base(run),
    "is not the name of an adapter's file": lambda run: changed(run, drawing={"adapters": {"../../x": "0"}}),
    "cannot be read as a picture": lambda run: broken_image(run),
}


def first_line(run, line, name="metrics.jsonl"):
    (run / name).write_bytes(line + b"\n" + (run / name).read_bytes())
    return run


def pipe(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    return run


def folder(run, name):
    (run / name).unlink()
    (run / name).mkdir()
    return run


def link_out(run, name):
    """What is there, or an empty file, is moved out of the run's folder, and a link put in its place."""
    outside = run.with_name(f"outside-{name}")
    (run / name).rename(outside) if (run / name).exists() else outside.write_text("")
    (run / name).symlink_to(outside)
    return run


def recipe_with(run, **keys):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | keys))
    return run


def without_strict_in_base(run):
    content = json.loads((run / "eval.json").read_text())
    for row in content["base"]["images"]:
        del row["strict"]
    (run / "eval.json").write_text(json.dumps(content))
    return run


def without_a_base(run):
    content = evaluation(["one", "two"], {1.0: (0.3, 0.5), 2.0: (0.3, 0.5)}, 0)
    del content["base"]
    (run / "eval.json").write_text(json.dumps(content))
    return run


def broken_image(run):
    (run / "samples" / "eval" / "guidance-1" / "base" / "0000.png").write_bytes(b"GIF")
    return run


@pytest.mark.parametrize("message", BROKEN)
def test_a_folder_that_holds_no_whole_run_is_refused_by_name(message, tmp_path):
    run = write_run(tmp_path / "mine")
    given = BROKEN[message](run)
    with pytest.raises(UserError, match=message) as refused:
        render(load([given]))
    assert str(given) in str(refused.value)


def test_a_sweep_without_a_finished_cell_or_beside_a_run_is_refused(tmp_path):
    folder = write_sweep(tmp_path / "study", {"one": {}}, [0], {"one-seed0": "failed"})
    with pytest.raises(UserError, match="no cell of the sweep is finished .one-seed0: failed"):
        load([folder])
    with pytest.raises(UserError, match="one sweep, or run folders"):
        load([folder, write_run(tmp_path / "mine")])
    (folder / "sweep.json").write_text('{"cells": 3}')
    with pytest.raises(UserError, match="is not a sweep's record"):
        load([folder])


def test_a_cell_of_a_sweep_that_is_read_through_a_link_is_left_out_by_name(tmp_path):
    sweep = write_sweep(tmp_path / "study", {"one": {}}, [0, 1])
    link_out(sweep / "cells" / "one-seed1", "eval.json")
    loaded = load([sweep])
    assert [run.name for run in loaded.runs] == ["one-seed0"]
    (left_out,) = (cell for cell in loaded.cells if not cell.used)
    assert "eval.json: is a link out of its folder" in left_out.why


def test_a_sweeps_record_cannot_point_out_of_its_folder(tmp_path):
    folder = write_sweep(tmp_path / "study", {"one": {}}, [0])
    record = (folder / "sweep.json").read_text().replace('"cells/one-seed0"', '"../elsewhere"')
    (folder / "sweep.json").write_text(record)
    with pytest.raises(UserError, match="outside the sweep's folder"):
        load([folder])
