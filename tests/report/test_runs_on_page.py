"""Which runs a report is made of, and what it says of those that it leaves out."""

import hashlib
import json

import pytest
from making_runs import by_geneval, not_evaluated, write_run, write_sweep
from reading_pages import page

from agsm_rl.errors import UserError
from agsm_rl.report.load import load


def test_cells_that_are_not_done_are_told_and_not_counted(sweep):
    found = page(sweep)
    assert "2 of 6 cells of the sweep are not in these figures" in found.text
    assert "weak-seed2 weak 2 failed not in the report : the loss is not finite" in found.text.replace(
        "report:", "report :"
    )
    assert "strong-seed2 strong 2 running not in the report" in found.text
    assert [one["seeds"] for one in found.data["variants"]] == [[0, 1], [0, 1]]


def test_a_finished_cell_that_was_not_evaluated_is_told(tmp_path):
    folder = write_sweep(tmp_path / "study", {"one": {}}, [0, 1])
    (folder / "cells" / "one-seed1" / "eval.json").unlink()
    found = page(folder)
    assert "1 of 2 cells of the sweep is not in these figures" in found.text and "has no eval.json" in found.text


def test_a_run_that_evaluates_nothing_has_its_curves_and_samples(tmp_path):
    found = page(not_evaluated(write_run(tmp_path / "mine")), not_evaluated(write_run(tmp_path / "other", rank=4)))
    assert "How 2 variants learned." in found.text and "agsm-rl eval" in found.text
    assert found.data["suites"] == []
    assert [run["curves"]["step"][-1] for run in found.data["runs"]] == [40, 40]
    assert sum(str(one).startswith("data:image/webp") for one in found.references) == 2


def test_a_run_that_went_on_after_it_was_measured_is_told(tmp_path):
    run = by_geneval(write_run(tmp_path / "mine"), trained=0.8)
    content = json.loads((run / "eval.json").read_text())
    (run / "adapter").mkdir()
    (run / "adapter" / "tokens.safetensors").write_bytes(b"of step 2")
    digests = {"tokens.safetensors": hashlib.sha256(b"of step 2").hexdigest()}
    (run / "eval.json").write_text(json.dumps(content | {"drawing": {"adapters": digests}}))
    assert load([run]).evaluated
    (run / "adapter" / "tokens.safetensors").write_bytes(b"of step 3")
    with pytest.raises(UserError, match="the run was continued"):
        load([run])


def test_recipes_are_there_with_what_differs(sweep):
    text = page(sweep).text
    assert "adapters.lora.rank 8 4" in text
    assert "objectives.ddpo – {name: ddpo, use: ddpo}" in text
    assert text.count("checkpoint: builtin:shapes-sd15") == 2
