"""Sweeps whose cells are measured on suites: figures, what ranks the cells, and what is not measured twice."""

import json
from pathlib import Path

import pytest

from agsm_rl.errors import UserError

MINE = {"use": "rewards", "prompts": "mine.txt", "rewards": {"sharpness": {}, "brightness": {}}}
TOY = {"use": "shapes", "num_images": 3, "rewards": ["brightness"]}
EVALUATION = {"suites": {"mine": MINE, "toy": TOY}, "guidance": [1.0, 2.0], "num_steps": 1, "split": "validation"}
RUN = Path("runs/mine")


@pytest.fixture(autouse=True)
def prompts(write):
    Path("mine.txt").write_text("a cat\na dog\n")


def test_cells_are_measured_on_every_suite_and_share_the_base_s(sweep, measured):
    axes = {"optimizer.learning_rate": [0.001, 0.1]}
    board, ran = sweep(axes=axes, evaluate=[EVALUATION])
    assert board.count("done") == len(ran) == 2, [state.error for state in board.states.values()]
    # Two suites at two guidances: for each of two cells, and once for the base.
    assert len(measured) == 2 * 4 + 4 and sum(adapted for _, adapted in measured) == 8
    summary = json.loads((RUN / "sweep.json").read_text())
    for cell in summary["cells"]:
        content = json.loads((RUN / cell["run"] / "eval.json").read_text())
        assert list(content["suites"]) == ["mine", "toy"] and content["suite"] == "rewards"
        for figures, entry in zip(cell["evaluations"], content["suites"]["mine"]["guidances"], strict=True):
            assert list(figures["scores"]) == [
                *("mine/sharpness", "mine/brightness"),
                *("toy/overall", "toy/strict", "toy/brightness"),
            ]
            assert figures["guidance"] == entry["guidance"]
            assert figures["scores"]["mine/sharpness"]["value"] == entry["tags"]["sharpness"]["score"]
        assert (RUN / cell["run"] / "samples/eval/toy/guidance-2/trained/0000.png").is_file()
    assert all("scores" in row for row in summary["base"]) and len(summary["base"]) == 2
    measured.clear()
    _, ran = sweep(axes=axes, evaluate=[EVALUATION | {"guidance": [1.0, 2.0, 3.0]}])
    assert len(ran) == 2 and len(measured) == 2 * 2 + 2  # only the new guidance


def test_a_search_maximises_a_suite_s_score(sweep):
    axes = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    pytest.importorskip("optuna")
    board, _ = sweep(axes=axes, evaluate=[EVALUATION], search={"trials": 2, "maximise": "toy/brightness"})
    assert board.count("done") == 2
    summary = json.loads((RUN / "sweep.json").read_text())
    best = {
        cell["cell"]: max(row["scores"]["toy/brightness"]["value"] for row in cell["evaluations"])
        for cell in summary["cells"]
    }
    assert summary["best"]["value"] == max(best.values())


def test_a_score_that_no_suite_has_is_refused_before_anything_runs(plan):
    axes = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-1}}
    search = {"trials": 1, "maximise": "mine/sharpnes"}
    with pytest.raises(UserError, match="search.maximise: 'mine/sharpnes' is not a score.*Did you mean 'mine/sharp"):
        plan(axes=axes, evaluate=[EVALUATION], search=search)


def test_cells_are_ranked_by_the_first_suite_s_first_score_or_strictly(plan):
    axes = {"optimizer.learning_rate": [0.001, 0.1]}
    assert plan(axes=axes, evaluate=[EVALUATION]).ranked_by == ("mine/sharpness", True)
    assert plan(axes=axes, evaluate=[{"num_images": 2}]).ranked_by == ("strict", True)


def test_a_cell_whose_suite_cannot_be_judged_is_not_trained(sweep):
    judge = {"use": "rewards", "prompts": "mine.txt", "rewards": {"ocr": {}}}  # it needs the column `text`
    axes = {"optimizer.learning_rate": [0.001]}
    board, _ = sweep(axes=axes, evaluate=[EVALUATION | {"suites": {"mine": judge}}])
    assert board.count("done") == 0 and "ocr" in str(board.states)
    assert not list(RUN.glob("cells/*/checkpoints/*"))
