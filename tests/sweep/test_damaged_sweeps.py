"""Damage in a sweep's folder: it affects one cell, the others run, and files that are not ours are never deleted."""

import json
import os
from pathlib import Path

import pytest
from sweep_parts import EVALUATE

from agsm_rl.errors import UserError

RUN = Path("runs/mine")
TWO = {"objective": {"plain": {}, "half": {"objectives.0.weight": 0.5}}}


def cell(name):
    return RUN / "cells" / name


@pytest.fixture
def trained(sweep):
    """Two finished cells without evaluations, and a function that runs the sweep again."""
    sweep(axes=TWO, name="mine", evaluate=[])
    return lambda: sweep(axes=TWO, name="mine", evaluate=[])


def test_a_damaged_cell_json_repeats_its_own_cell_only(trained):
    before = json.loads((cell("plain-seed0") / "cell.json").read_text())
    for content in (b"", b"[1]", b'{"settings": 5}'):
        (cell("plain-seed0") / "cell.json").write_bytes(content)
        board, ran = trained()
        assert (ran, board.count("done")) == (["plain-seed0"], 2)
        assert json.loads((cell("plain-seed0") / "cell.json").read_text()) == before


def test_a_damaged_trained_json_and_job_repeat_no_training(trained):
    (cell("half-seed0") / "cell.json").unlink()
    (cell("half-seed0") / "trained.json").write_bytes(b"")
    (RUN / "jobs" / "half-seed0.yaml").write_text("[1]")
    board, ran = trained()
    assert (ran, board.count("done")) == (["half-seed0"], 2)
    assert json.loads((cell("half-seed0") / "trained.json").read_text())["steps"] == 2


def test_a_cell_without_its_recipe_fails_and_keeps_all_its_files(trained):
    folder = cell("plain-seed0")
    for name in ("cell.json", "trained.json", "recipe.yaml"):
        (folder / name).unlink()
    (folder / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    (cell("half-seed0") / "cell.json").unlink()
    board, ran = trained()
    assert ran == ["plain-seed0", "half-seed0"] and (board.count("done"), board.count("failed")) == (1, 1)
    assert "has no recipe.yaml but is not empty" in board.states["plain-seed0"].error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before


def test_a_cell_whose_recipe_is_damaged_fails_alone(trained):
    (cell("plain-seed0") / "recipe.yaml").write_bytes(b"\xff")
    for name in ("plain-seed0", "half-seed0"):
        (cell(name) / "cell.json").unlink()
        (cell(name) / "trained.json").unlink()
    board, _ = trained()
    assert (board.count("done"), board.count("failed")) == (1, 1)
    assert "not text in UTF-8" in board.states["plain-seed0"].error


def test_metrics_that_are_damaged_or_gone_do_not_stop_a_finished_cell(trained):
    for content in (b'{"step": 1, "seconds": "x"}\n\xff\n{"step"', None):
        (cell("plain-seed0") / "cell.json").unlink()
        (cell("plain-seed0") / "trained.json").unlink()
        metrics = cell("plain-seed0") / "metrics.jsonl"
        metrics.unlink() if content is None else metrics.write_bytes(content)
        board, ran = trained()
        assert (ran, board.count("done")) == (["plain-seed0"], 2)
    assert json.loads((cell("plain-seed0") / "trained.json").read_text())["steps"] == 2


def test_a_damaged_measurement_is_repeated_with_the_same_result(sweep, measured):
    evaluate = [EVALUATE[0] | {"keep_base": False}]
    sweep(name="mine", evaluate=evaluate)
    before = json.loads((cell("mine-seed0") / "cell.json").read_text())
    assert len(measured) == 2
    for file in (next((cell("mine-seed0") / "evals").glob("*.json")), next((RUN / "base").glob("*.json"))):
        (cell("mine-seed0") / "cell.json").unlink()
        measured.clear()
        file.write_text('{"suite": "shapes"}')
        assert sweep(name="mine", evaluate=evaluate)[0].count("done") == 1
        assert len(measured) == 1
        assert json.loads((cell("mine-seed0") / "cell.json").read_text()) == before


@pytest.mark.parametrize("name", ["cells/plain-seed0", "logs", "base", "sweep.log", "jobs", "cells/half-seed0/samples"])
def test_a_link_out_of_the_sweep_is_refused_before_anything_is_written(trained, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    place = RUN / name
    if place.exists():
        place.rename(outside / "old")
    place.symlink_to(outside)
    (cell("half-seed0") / "cell.json").unlink()
    before = sorted(path.name for path in outside.rglob("*"))
    with pytest.raises(UserError, match="is a link out of its folder"):
        trained()
    assert sorted(path.name for path in outside.rglob("*")) == before


def test_a_pipe_in_a_sweep_folder_is_refused_and_does_not_hang(trained):
    (RUN / "sweep.log").unlink()
    os.mkfifo(RUN / "sweep.log")
    with pytest.raises(UserError, match=r"sweep.log: is not a regular file"):
        trained()


@pytest.mark.parametrize("name", ["sweep.log", "search.log", "sweep.json", "cells", "jobs"])
def test_a_folder_in_place_of_a_file_or_a_file_in_place_of_a_folder_is_refused_by_name(trained, name):
    place = RUN / name
    if place.exists():
        place.rename(RUN / f"moved-{name}")
    place.mkdir() if "." in name else place.write_text("")
    with pytest.raises(UserError, match=rf"{name}: this must be a f\w+, but it is"):
        trained()
