"""Axes that are searched: trials are cells, the best is reported, and interrupted trials are repeated."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import pytest
from newer_versions import change_options
from rich.console import Console
from sweep_parts import EVALUATE

from agsm_rl.errors import UserError
from agsm_rl.sweep.board import Board
from agsm_rl.sweep.executors import Outcome
from agsm_rl.sweep.plan import make_cell
from agsm_rl.sweep.run import Runner

pytest.importorskip("optuna")
SEARCHED = {
    "axes": {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "steps": {"low": 1, "high": 2}},
    "evaluate": EVALUATE[:1],
}
RUN = Path("runs/mine")


@pytest.fixture
def scores(monkeypatch):
    """Scores of the cells: learning rate times steps, so that the best cell is known."""
    monkeypatch.setattr(
        "agsm_rl.sweep.search._score", lambda runner, cell: cell.recipe.optimizer.learning_rate * cell.recipe.steps
    )


def summary():
    return json.loads((RUN / "sweep.json").read_text())


def test_each_trial_is_a_cell_and_the_best_one_is_reported(sweep, scores):
    board, ran = sweep(**SEARCHED, search={"trials": 2})
    assert len(ran) == board.count("done") == 2
    first = summary()
    best = max(first["cells"], key=lambda row: row["axes"]["optimizer.learning_rate"] * row["axes"]["steps"])
    assert first["best"]["axes"] == best["axes"]
    for row in first["cells"]:
        rate, steps = row["axes"]["optimizer.learning_rate"], row["axes"]["steps"]
        assert row["cell"] == f"learning_rate={rate:g},steps={steps}-seed0"
        assert 1e-4 <= rate <= 1e-2 and steps in (1, 2)
    _, ran = sweep(**SEARCHED, search={"trials": 3})
    assert len(ran) == 1
    assert [row["cell"] for row in summary()["cells"]][:2] == [row["cell"] for row in first["cells"]]


def test_an_interrupted_trial_is_repeated_with_the_same_values(sweep, scores, monkeypatch):
    run, tried = Runner.run, []

    def killed(runner, cells):
        tried.extend(cell.name for cell in cells)
        runner.stopping = True

    monkeypatch.setattr(Runner, "run", killed)
    with pytest.raises(RuntimeError, match="stopped"):
        sweep(**SEARCHED, search={"trials": 1})
    monkeypatch.setattr(Runner, "run", run)
    _, ran = sweep(**SEARCHED, search={"trials": 1})
    assert ran == tried
    _, ran = sweep(**SEARCHED, search={"trials": 1})
    assert ran == []


def test_a_failed_trial_is_repeated_with_the_same_values(sweep, monkeypatch):
    monkeypatch.setattr("agsm_rl.sweep.search._score", lambda runner, cell: None)
    _, failed = sweep(**SEARCHED, search={"trials": 1})
    assert "best" not in summary()
    monkeypatch.setattr("agsm_rl.sweep.search._score", lambda runner, cell: 1.0)
    sweep(**SEARCHED, search={"trials": 1})
    assert [row["cell"] for row in summary()["cells"]] == failed
    assert summary()["best"]["value"] == 1.0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seeds": 2}, "seeds"),
        ({"search": {"trials": 1, "maximise": "overall"}}, "search"),
        ({"set": {"optimizer.max_grad_norm": 2.0}}, "set"),
        ({"axes": SEARCHED["axes"] | {"kind": {"a": {}, "b": {}}}}, "axes"),
    ],
)
def test_a_changed_search_is_refused(sweep, scores, changes, key):
    sweep(**SEARCHED, search={"trials": 1})
    with pytest.raises(UserError, match=f"its search was started with a different `{key}`.*another --dir"):
        sweep(**SEARCHED | {"search": {"trials": 1}} | changes)


def test_a_search_continues_when_options_are_added(sweep, scores, monkeypatch):
    evaluate = [EVALUATE[0] | {"rewards": ["shapes"]}]
    sweep(**SEARCHED | {"evaluate": evaluate}, search={"trials": 1})
    change_options(monkeypatch, "rewards", "shapes", newer=0.0)
    change_options(monkeypatch, "objectives", "score_matching", newer=0.0)
    board, ran = sweep(**SEARCHED | {"evaluate": evaluate}, search={"trials": 2})
    assert (len(ran), board.count("done")) == (1, 2)
    change_options(monkeypatch, "rewards", "shapes", newer=0.0, verdict="graded")
    with pytest.raises(UserError, match="its search was started with a different `evaluate`"):
        sweep(**SEARCHED | {"evaluate": evaluate}, search={"trials": 2})


def test_trials_with_equal_values_share_a_running_cell_that_is_recorded_once(plan):
    class Waiting:
        submitted: ClassVar[list[str]] = []

        def submit(self, job, log):
            self.submitted.append(job.stem)
            return Future()

    made = plan(**SEARCHED, search={"trials": 1})
    made.folder.mkdir(parents=True)
    cell = make_cell(made, {"optimizer.learning_rate": 1e-3, "steps": 1}, 0)
    runner = Runner(made, Board(made, Console(quiet=True), capacity=1), Waiting())
    runner.board.add([cell])
    future = runner.start(cell)
    assert runner.start(cell) is future and Waiting.submitted == [cell.name]
    future.set_result(Outcome(2, 1.0, "no luck"))
    runner.finish(cell, future)
    assert "no luck" in runner.board.states[cell.name].error
    runner.board.states[cell.name].error = "noted"
    runner.finish(cell, future)
    assert runner.board.states[cell.name].error == "noted"


def test_the_score_is_the_mean_of_validation_at_its_best_guidance(plan):
    from agsm_rl.sweep.search import _score

    evaluate = [{"split": "validation", "guidance": [1.0, 2.0]}, {"split": "held_out", "guidance": [1.0]}]
    made = plan(**SEARCHED | {"evaluate": evaluate}, search={"trials": 1})
    made.folder.mkdir(parents=True)
    cell = make_cell(made, {"optimizer.learning_rate": 1e-3, "steps": 1}, 0)
    runner = Runner(made, Board(made, Console(quiet=True), capacity=1), None)
    runner.board.add([cell])
    assert _score(runner, cell) is None
    rows = [("validation", 1.0, 0.2), ("validation", 2.0, 0.3), ("held_out", 1.0, 0.9)]
    keys = ("split", "guidance", "strict")
    runner.board.states[cell.name].result = {"evaluations": [dict(zip(keys, row, strict=True)) for row in rows]}
    assert _score(runner, cell) == 0.3
    made.sweep.search.guidance = 1.0
    assert _score(runner, cell) == 0.2


DAMAGE = {
    "a line of nonsense in the middle": lambda lines: [lines[0], b"\xff\x00{\n", *lines[1:]],
    "JSON of another kind": lambda lines: [b"[1]\n", *lines],
    "an operation that does not exist": lambda lines: [b'{"op_code": 99, "worker_id": "x"}\n', *lines],
    "zeros": lambda lines: [b"\0" * 4096 + b"\n", b"\0" * 10 + b"\n"],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_search_log_is_moved_aside_and_the_finished_cells_stay(sweep, scores, damage):
    sweep(**SEARCHED, search={"trials": 2})
    before, content = summary(), (RUN / "search.log").read_bytes()
    (RUN / "search.log").write_bytes(b"".join(DAMAGE[damage](content.splitlines(keepends=True))))
    board, ran = sweep(**SEARCHED, search={"trials": 2})
    assert (ran, board.count("done")) == ([], 2)
    assert summary()["best"] == before["best"]
    assert (RUN / "search.log.damaged-1").is_file()
    assert (RUN / "sweep.log").read_text().count("search.log: is damaged") == 1


def test_a_last_line_torn_by_a_kill_costs_no_trial_of_a_search(sweep, scores):
    sweep(**SEARCHED, search={"trials": 1})
    with (RUN / "search.log").open("ab") as file:
        file.write(b'{"op_code": 5, "worker')
    for trials in (2, 3):
        _, ran = sweep(**SEARCHED, search={"trials": trials})
        assert len(ran) == 1
    assert not list(RUN.glob("search.log.damaged*"))
