"""Running a sweep: its files, what is repeated and what is not, failures, dependencies, and the budget."""

import json
import shutil
from io import StringIO
from itertools import count
from pathlib import Path

import pytest
from making_runs import write_run
from rich.console import Console
from safetensors.torch import load_file, save_file
from sweep_parts import EVALUATE

from agsm_rl.errors import UserError
from agsm_rl.evaluate.batch_size import BatchSizes
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.report.load import load
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.records import MetricsFile
from agsm_rl.sources.cache_folder import cache_folder
from agsm_rl.sweep import evaluations
from agsm_rl.sweep.cell import TimeLimit

RUN = Path("runs/mine")
TWO = {"objective": {"plain": {}, "half": {"objectives.0.weight": 0.5}}}


def summary():
    return json.loads((RUN / "sweep.json").read_text())


def cell(name):
    return RUN / "cells" / name


def steps_of(name):
    return [json.loads(line)["step"] for line in (cell(name) / "metrics.jsonl").read_text().splitlines()]


def test_a_sweep_without_evaluations_reports_curves_until_its_cells_are_measured(sweep, measured):
    board, _ = sweep(axes=TWO, name="mine", evaluate=[])
    assert board.count("done") == 2 and measured == []
    assert (summary()["reported"], summary()["evaluate"]) == (None, [])
    assert (cell("half-seed0") / "samples" / "before_after.png").is_file()
    loaded = load([RUN])
    assert not loaded.evaluated and [variant.name for variant in loaded.variants] == ["plain", "half"]
    assert sweep(axes=TWO, name="mine", evaluate=[])[1] == []  # all of it is done
    # A cell that is measured afterwards is in the report; the other one is listed as not evaluated.
    shutil.copy(write_run(Path("judged")) / "eval.json", cell("half-seed0"))
    loaded = load([RUN])
    assert loaded.evaluated and [run.name for run in loaded.runs] == ["half-seed0"]
    assert [(run.name, run.why) for run in loaded.cells if not run.used] == [("plain-seed0", "was not evaluated")]


def test_a_finished_sweep_leaves_run_folders_and_a_summary(sweep):
    board, _ = sweep(axes=TWO, name="mine")
    assert (board.count("done"), board.total) == (2, 2)
    content = summary()
    assert (content["name"], content["seeds"], content["reported"], content["budget"]) == (
        "mine",
        [0],
        "held_out",
        None,
    )
    assert [(row["cell"], row["status"]) for row in content["cells"]] == [
        ("plain-seed0", "done"),
        ("half-seed0", "done"),
    ]
    row = content["cells"][1]
    assert (row["variant"], row["axes"], row["seed"]) == ("half", {"objective": "half"}, 0)
    assert (row["steps"], row["images"], row["error"], row["start_from"]) == (2, 8, None, None)
    assert row["seconds"] > 0
    assert [figures["split"] for figures in row["evaluations"]] == ["validation", "held_out"]
    assert [figures["split"] for figures in content["base"]] == ["validation", "held_out"]
    for figures in row["evaluations"]:
        kept = json.loads((RUN / figures["file"]).read_text())
        assert (kept["split"], kept["step"]) == (figures["split"], 2)
        assert kept["strict"]["overall"] == figures["strict"]
        assert kept["difference"]["strict"]["overall"] == figures["difference"]
    folder = cell("half-seed0")
    assert Recipe.from_yaml(folder / "recipe.yaml").objectives[0].weight == 0.5
    assert (folder / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert (folder / "eval.json").is_file() and (folder / "eval-validation.json").is_file()
    assert (folder / "samples" / "before_after.png").is_file()
    pictures = folder / "samples" / "eval" / "guidance-1"
    assert len(list((pictures / "trained").iterdir())) == len(list((pictures / "base").iterdir())) == 6


def test_the_base_is_measured_once_for_all_cells_with_the_same_settings(sweep, measured):
    sweep(axes=TWO)
    assert measured == [
        ("validation", True),
        ("validation", False),
        ("held_out", True),
        ("held_out", False),
        ("validation", True),
        ("held_out", True),
    ]
    measured.clear()
    sweep(name="another", evaluate=EVALUATE[:1])
    another = RUN.with_name("another")
    assert measured == [("validation", True)]  # the base's figures come from the cache
    assert json.loads((another / "sweep.json").read_text())["base"] == summary()["base"][:1]
    assert len([*another.glob("base/*/*.png")]) == 6  # and are in the sweep's own folder too


def test_the_base_s_figures_are_kept_under_the_batch_size_that_it_was_drawn_with(sweep, monkeypatch):
    sizes, drawn, measure = count(1), [], evaluations.measure
    monkeypatch.setattr(BatchSizes, "choose", lambda *_: next(sizes))  # as a GPU's free memory changes

    def noting(backbone, entry, options, guidance, **more):
        drawn.append(options.batch_size)
        return measure(backbone, entry, options, guidance, **more)

    monkeypatch.setattr(evaluations, "measure", noting)
    sweep(evaluate=EVALUATE[:1])
    (file,) = cache_folder().glob("figures-*/shapes-*.json")
    assert json.loads(file.read_text())["settings"]["batch_size"] == drawn[1]  # after the trained model


def test_cells_with_another_base_measure_that_base(sweep, measured, recipe, tiny_checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    file = other / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    sweep(axes={"backbone.checkpoint": [str(tiny_checkpoint), str(other)]}, evaluate=EVALUATE[:1])
    assert measured == [("validation", True), ("validation", False)] * 2
    assert {row["backbone"] for row in summary()["base"]} == {str(tiny_checkpoint), str(other)}


def test_a_finished_sweep_is_not_run_again(sweep):
    sweep(evaluate=EVALUATE[:1])
    before = summary()
    board, ran = sweep(evaluate=EVALUATE[:1])
    assert (ran, board.count("done")) == ([], 1)
    assert summary() == before


def test_only_new_cells_run_when_seeds_and_variants_are_added(sweep):
    sweep(axes={"objective": {"plain": {}}}, evaluate=EVALUATE[:1])
    _, ran = sweep(axes=TWO, evaluate=EVALUATE[:1])
    assert ran == ["half-seed0"]
    _, ran = sweep(axes=TWO, evaluate=EVALUATE[:1], seeds=[0, 3])
    assert ran == ["plain-seed3", "half-seed3"]


def test_finished_cells_count_from_the_start_wherever_they_are_in_the_order(sweep):
    sweep(axes={"objective": {"half": TWO["objective"]["half"]}}, evaluate=EVALUATE[:1])
    _, ran = sweep(axes=TWO, evaluate=EVALUATE[:1])
    assert ran == ["plain-seed0"]
    assert "plain-seed0: done" in (RUN / "sweep.log").read_text()
    assert "(2 of 2" in (RUN / "sweep.log").read_text().splitlines()[-1]


def test_a_cell_continues_from_its_checkpoint_and_keeps_its_evaluations(sweep, measured):
    sweep(axes=TWO)
    folder = cell("plain-seed0")
    weights = load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    # As after a kill during the second evaluation.
    (folder / "cell.json").unlink()
    next((folder / "evals").glob("held_out*.json")).unlink()
    # And another during training, after the first checkpoint.
    other = cell("half-seed0")
    for name in ("cell.json", "trained.json", "checkpoints/step-00000002.pt", "checkpoints/step-00000002.sha256"):
        (other / name).unlink()
    kept = load_file(other / "adapter" / "pytorch_lora_weights.safetensors")
    first_line = (other / "metrics.jsonl").read_text().splitlines()[0]
    measured.clear()
    _, ran = sweep(axes=TWO)
    assert ran == ["plain-seed0", "half-seed0"]
    assert measured == [("held_out", True)]
    assert steps_of("half-seed0") == [1, 2]
    assert (other / "metrics.jsonl").read_text().splitlines()[0] == first_line
    for run, before in ((folder, weights), (other, kept)):
        after = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
        assert all(after[name].equal(before[name]) for name in before)


def test_an_added_guidance_or_split_is_all_that_is_measured(sweep, measured):
    sweep(evaluate=EVALUATE[:1])
    checkpoints = cell("mine-seed0") / "checkpoints"
    for file in checkpoints.iterdir():
        file.unlink()
    measured.clear()
    board, _ = sweep(evaluate=[EVALUATE[0] | {"guidance": [1.0, 2.0]}, EVALUATE[1]])
    assert board.count("done") == 1
    assert measured == [("validation", True), ("validation", False), ("held_out", True), ("held_out", False)]
    assert not any(checkpoints.iterdir())
    figures = [(row["split"], row["guidance"]) for row in summary()["cells"][0]["evaluations"]]
    assert figures == [("validation", 1.0), ("validation", 2.0), ("held_out", 1.0)]
    assert Recipe.from_yaml(cell("mine-seed0") / "recipe.yaml").evaluate.split == "held_out"


def test_a_cell_without_its_adapter_is_trained_again_when_evaluations_are_added(sweep, measured):
    sweep(evaluate=EVALUATE[:1])
    before = steps_of("mine-seed0")
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(cell("mine-seed0") / name)
    board, _ = sweep(evaluate=EVALUATE)
    assert (board.count("done"), steps_of("mine-seed0")) == (1, before)
    assert list((cell("mine-seed0") / "adapter").glob("*.safetensors"))


def test_a_cell_that_was_killed_before_its_first_step_starts(sweep):
    cell("plain-seed0").mkdir(parents=True)
    (cell("plain-seed0") / ".recipe.yaml.1.new").write_text("st")
    (RUN / "sweep.yaml").write_text("")
    board, _ = sweep(axes={"objective": {"plain": {}}})
    assert board.count("done") == 1


def test_a_failed_cell_is_reported_and_does_not_stop_others(sweep, tmp_path, recipe):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("")
    own = {"use": "rollouts", "prompts": str(prompts), "rewards": {"brightness": 1.0}, "num_steps": 2}
    own |= {"num_prompts": 1, "images_per_prompt": 2}
    broken = {"sources": {"own": own}, "objectives": [{"use": "ddpo", "source": "own"}]}
    axes = {"objective": {"broken": broken, "after": {"start_from": "broken"}, "plain": {}}}
    board, ran = sweep(axes=axes, evaluate=EVALUATE[:1])
    assert ran == ["broken-seed0", "plain-seed0"]
    assert (board.count("failed"), board.count("done")) == (2, 1)
    rows = {row["cell"]: row for row in summary()["cells"]}
    assert rows["broken-seed0"]["status"] == "failed"
    assert "prompts.txt': it has no prompts" in rows["broken-seed0"]["error"]
    assert rows["after-seed0"]["error"] == "not started, because 'broken-seed0' failed"
    assert "broken-seed0: failed: exit code 2" in (RUN / "sweep.log").read_text()
    prompts.write_text("a red star\n")
    board, ran = sweep(axes=axes, evaluate=EVALUATE[:1])
    assert (ran, board.count("done")) == (["broken-seed0", "after-seed0"], 3)


def test_a_cell_starts_with_the_adapter_of_the_cell_named_in_start_from(sweep):
    """The learning rate is too small to change anything: the second cell ends with the first one's adapter."""
    still = {"start_from": "first", "optimizer.learning_rate": 1e-30, "optimizer.weight_decay": 0.0}
    _, ran = sweep(axes={"objective": {"second": still, "first": {}}}, seeds=2, evaluate=EVALUATE[:1])
    assert ran == ["first-seed0", "second-seed0", "first-seed1", "second-seed1"]
    weights = {}
    for name in ran:
        tensors = load_file(cell(name) / "adapter" / "pytorch_lora_weights.safetensors")
        weights[name] = {key: value for key, value in tensors.items() if ".lora_B." in key or "lora.up" in key}
    for key, value in weights["first-seed0"].items():
        assert value.abs().max() > 0
        assert weights["second-seed0"][key].allclose(value, rtol=1e-6)
        assert not weights["second-seed1"][key].allclose(value, rtol=1e-6)
    assert [row["start_from"] for row in summary()["cells"]] == ["first-seed0", None, "first-seed1", None]


def test_a_larger_budget_continues_training_and_is_evaluated_again(sweep, measured):
    sweep(budget={"steps": 1}, evaluate=EVALUATE[:1])
    measured.clear()
    sweep(budget={"steps": 3}, evaluate=EVALUATE[:1])
    assert steps_of("mine-seed0") == [1, 2, 3]
    assert measured == [("validation", True)]
    assert summary()["cells"][0]["steps"] == 3


def test_a_budget_in_seconds_ends_training_but_not_evaluation(sweep):
    sweep(budget={"seconds": 1e-6}, evaluate=EVALUATE[1:])
    assert [row["error"] for row in summary()["cells"]] == [None]
    assert steps_of("mine-seed0") == [1]
    assert list((cell("mine-seed0") / "checkpoints").glob("*.pt"))
    [row] = summary()["cells"]
    assert (row["steps"], row["images"]) == (1, 4)
    assert json.loads((cell("mine-seed0") / "eval.json").read_text())["step"] == 1
    _, ran = sweep(budget={"seconds": 1e-6}, evaluate=EVALUATE[1:])
    assert ran == []


def test_seconds_of_earlier_sessions_count(tmp_path):
    class Stub:
        stopping = False

    folder = RunFolder(tmp_path)
    for step in (1, 2):
        MetricsFile(folder.metrics).add(step, {"seconds": 4.0})
    limit, trainer = TimeLimit(folder, 10.0), Stub()
    for step, stopping in ((3, False), (4, True)):
        MetricsFile(folder.metrics).add(step, {"seconds": 1.0})
        limit.on_step(trainer, step, {"seconds": 1.0})
        assert trainer.stopping is stopping


def test_a_changed_sweep_is_refused(sweep):
    sweep(evaluate=EVALUATE[:1])
    with pytest.raises(UserError, match=r"mine-seed0.recipe.yaml: the run was started with optimizer.*another --dir"):
        sweep(set={"optimizer.learning_rate": 0.5})
    with pytest.raises(UserError, match="a different budget than the 1 steps that it has now"):
        sweep(budget={"steps": 1})


def test_a_smaller_budget_of_seconds_is_refused_and_a_larger_one_continues(sweep):
    sweep(budget={"seconds": 1e-6}, evaluate=EVALUATE[:1])
    with pytest.raises(UserError, match="mine-seed0: was started with a different budget than the 1e-07 seconds"):
        sweep(budget={"seconds": 1e-7}, evaluate=EVALUATE[:1])
    assert sweep(budget={"seconds": 2e-6}, evaluate=EVALUATE[:1])[1] == ["mine-seed0"]


def test_a_chain_is_not_continued_from_a_start_that_has_changed(sweep):
    axes = {"objective": {"first": {}, "second": {"start_from": "first"}}}
    sweep(axes=axes, evaluate=EVALUATE[:1])
    with pytest.raises(UserError, match="cell 'second-seed0' cannot be continued"):
        sweep(axes=axes, evaluate=EVALUATE[:1], budget={"steps": 3})


def test_a_folder_that_belongs_to_something_else_is_refused(sweep):
    RUN.mkdir(parents=True)
    (RUN / "notes.txt").write_text("")
    with pytest.raises(UserError, match="is not empty and does not belong to a sweep"):
        sweep()


def test_the_live_table_shows_running_failed_and_best_cells(sweep):
    board, _ = sweep(axes={"objective": {"plain": {}}}, evaluate=EVALUATE[:1])
    out = StringIO()
    Console(file=out, width=100).print(board)
    assert "mine: 1 of 1 cells done" in out.getvalue()
    assert "best cells (validation, strict)" in out.getvalue()
    board.states["plain-seed0"].status = "running"
    Console(file=out, width=100).print(board)
    assert "evaluation 1 of 1" in out.getvalue()
    board.end("plain-seed0", result=None, error="exit code 2\nagsm-rl: no memory")
    Console(file=out, width=100).print(board)
    assert "mine: 0 of 1 cells done, 1 failed" in out.getvalue()
    assert "plain-seed0: agsm-rl: no memory" in out.getvalue()
