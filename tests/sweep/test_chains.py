"""Cells that start from others, when what they start from changes after they were trained."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from sweep_parts import EVALUATE

from agsm_rl.errors import UserError

RUN = Path("runs/mine")
WEIGHT = "objectives.0.weight"
CHANGED = r"first-seed0: the run was started with objectives\[0\].weight = 1.0, but now it is 2.0."


def cell(name):
    return RUN / "cells" / name


def remove(*names):
    for name in names:
        shutil.rmtree(cell(name))


def as_an_earlier_version_left_it(name):
    """Without what the cells that this one starts from were trained with."""
    for file in (cell(name) / "cell.json", cell(name) / "trained.json"):
        content = json.loads(file.read_text())
        del content["starts"]
        file.write_text(json.dumps(content))
    file = RUN / "jobs" / f"{name}.yaml"
    job = yaml.safe_load(file.read_text())
    del job["starts"]
    file.write_text(yaml.safe_dump(job))


@pytest.fixture
def chain(sweep):
    """Run the sweep `first`, `second` from it, and `third` from that; returns the cells that ran."""

    def chain(weight=1.0, evaluate=EVALUATE[:1], **changes):
        axes = {
            "objective": {
                "first": {WEIGHT: weight} | changes,
                "second": {"start_from": "first"},
                "third": {"start_from": "second"},
            }
        }
        return sweep(axes=axes, evaluate=evaluate)[1]

    return chain


ALL = ["first-seed0", "second-seed0", "third-seed0"]


def test_a_changed_start_is_refused_with_all_cells_that_must_go(chain):
    chain(1.0)
    with pytest.raises(UserError, match=rf"remove from runs/mine/cells: {', '.join(ALL)}\.$"):
        chain(2.0)
    remove(*ALL)
    assert chain(2.0) == ALL


def test_a_cell_is_not_done_when_its_start_was_removed_and_changed(chain):
    chain(1.0)
    remove("first-seed0")
    with pytest.raises(UserError, match=rf"{CHANGED} Cell 'second-seed0' was trained from .*: second-seed0, third-"):
        chain(2.0)
    assert not cell("first-seed0").exists()
    # Nor are those further down the chain.
    remove("second-seed0")
    with pytest.raises(UserError, match=rf"{CHANGED} Cell 'third-seed0' was trained from .*cells: third-seed0\.$"):
        chain(2.0)
    remove("third-seed0")
    assert chain(2.0) == ALL and chain(2.0) == []


def test_a_cell_is_not_done_when_its_start_was_trained_anew_by_a_sweep_without_it(chain, sweep):
    chain(1.0)
    remove("first-seed0")
    sweep(axes={"objective": {"first": {WEIGHT: 2.0}}}, evaluate=EVALUATE[:1])
    with pytest.raises(UserError, match=rf"{CHANGED} Cell 'second-seed0' was trained from"):
        chain(2.0)


def test_a_cell_is_not_done_when_its_start_was_removed_and_trains_for_longer(chain):
    chain()
    remove("first-seed0")
    with pytest.raises(UserError, match="different budget than the 3 steps that it has now, so cell 'second-seed0'"):
        chain(steps=3)


@pytest.mark.parametrize("left", [["cell.json"], ["recipe.yaml", "checkpoints"]])
def test_what_a_start_was_trained_with_is_found_in_an_archive_and_in_an_unfinished_cell(chain, left):
    chain(1.0)
    remove("first-seed0", "third-seed0")
    for file in cell("second-seed0").iterdir():
        if file.name not in left:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    if left == ["cell.json"]:
        shutil.rmtree(RUN / "jobs")
    with pytest.raises(UserError, match=rf"{CHANGED} Cell 'second-seed0' was trained from"):
        chain(2.0)


def test_a_start_that_is_trained_again_in_the_same_way_leaves_its_followers_done(chain):
    schedule = {0: 0.5, 2: 1.0}  # JSON turns its steps into texts
    chain(schedule)
    remove("first-seed0")
    assert chain(schedule) == ["first-seed0"]
    assert chain(schedule, **{"sample.num_images": 2}) == ["first-seed0"]  # which changes no weights


def test_cells_of_an_earlier_version_stay_done(chain):
    chain()
    for name in ALL:
        as_an_earlier_version_left_it(name)
    assert chain() == []
    assert chain(evaluate=EVALUATE) == ALL and chain(evaluate=EVALUATE) == []
