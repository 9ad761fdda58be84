"""Options that are added after a sweep was run: its cells stay done until one is set or a default changes."""

import json
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
from newer_versions import change_options
from sweep_parts import EVALUATE

from agsm_rl.errors import UserError
from agsm_rl.recipe import earlier
from agsm_rl.sweep.first_version import fingerprint, training_fingerprint
from agsm_rl.sweep.settings import Settings

CELL = Path("runs/mine/cells/mine-seed0")
PARTS = [
    ("objectives", "score_matching"),
    ("backbones", "stable_diffusion"),
    ("adapters", "lora"),
    ("sources", "pairs"),
    ("rewards", "shapes"),
]
REWARDED = [EVALUATE[0] | {"rewards": ["shapes"]}, EVALUATE[1]]
KEYS = {
    "objectives": "objectives.0.newer",
    "backbones": "backbone.newer",
    "adapters": "adapters.lora.newer",
    "sources": "objectives.0.source.newer",
}


@pytest.fixture
def newer_version(monkeypatch):
    """Give a registered class one more option, or other defaults: `newer_version("adapters", "lora", newer=0.0)`."""
    return partial(change_options, monkeypatch)


@pytest.fixture
def first(monkeypatch):
    """Record the first default of a newer option."""
    record = deepcopy(earlier._first_defaults())
    monkeypatch.setattr(earlier, "_first_defaults", lambda: record)
    return lambda kind, name, **options: record[kind][name].update(options)


def as_the_first_version_left_it():
    """Replace the settings by their hashes."""
    for name, hash_of, key in (
        ("cell.json", fingerprint, "fingerprint"),
        ("trained.json", training_fingerprint, "recipe"),
    ):
        content = json.loads((CELL / name).read_text())
        settings = Settings.from_json(content.pop("settings"))
        (CELL / name).write_text(json.dumps(content | {key: hash_of(settings)}))


@pytest.mark.parametrize("made_by", ["this version", "the first version", "the first version, without its jobs"])
def test_a_sweep_stays_done_when_options_are_added(sweep, newer_version, made_by):
    sweep(evaluate=REWARDED)
    if made_by != "this version":
        as_the_first_version_left_it()
    if made_by.endswith("jobs"):
        Path("runs/mine/jobs/mine-seed0.yaml").unlink()
    for kind, name in PARTS:
        newer_version(kind, name, newer=0.0)
    for _ in range(2):  # what is beside the cells has been written anew the second time
        board, ran = sweep(evaluate=REWARDED)
        assert (ran, board.count("done")) == ([], 1)


@pytest.mark.parametrize("kind, name", PARTS[:4])
def test_setting_a_newer_option_changes_the_settings(sweep, newer_version, kind, name):
    sweep(evaluate=EVALUATE[:1])
    newer_version(kind, name, newer=0.0)
    with pytest.raises(UserError, match=r"newer = 0.0, but now it is 0.5.*The sweep has changed"):
        sweep(evaluate=EVALUATE[:1], set={KEYS[kind]: 0.5})
    assert sweep(evaluate=EVALUATE[:1], set={KEYS[kind]: 0.0})[1] == []


def test_setting_a_newer_option_of_an_evaluated_reward_measures_the_cell_again(sweep, newer_version):
    sweep(evaluate=REWARDED)
    newer_version("rewards", "shapes", newer=0.0)
    evaluate = [REWARDED[0] | {"rewards": {"shapes": {"newer": 0.5}}}, REWARDED[1]]
    assert sweep(evaluate=evaluate)[1] == ["mine-seed0"]
    assert sweep(evaluate=evaluate)[1] == []


def test_a_changed_default_changes_the_settings(sweep, newer_version):
    sweep(evaluate=EVALUATE[:1])
    newer_version("objectives", "score_matching", caption_dropout=0.5)
    with pytest.raises(UserError, match=r"caption_dropout = 0.0, but now it is 0.5.*The sweep has changed"):
        sweep(evaluate=EVALUATE[:1])


def test_a_newer_option_whose_default_changed_later_changes_the_settings(sweep, newer_version, first):
    sweep(evaluate=EVALUATE[:1])
    newer_version("objectives", "score_matching", newer=0.25)
    first("objectives", "score_matching", newer=0.0)
    with pytest.raises(UserError, match=r"newer = 0.0, but now it is 0.25.*The sweep has changed"):
        sweep(evaluate=EVALUATE[:1])
    assert sweep(evaluate=EVALUATE[:1], set={"objectives.0.newer": 0.0})[1] == []


def test_measurements_from_before_an_evaluation_had_sizes_are_not_repeated(sweep, measured):
    sweep(evaluate=EVALUATE[:1])
    measured.clear()
    kept = [file for file in Path("runs/mine").rglob("*-guidance*.json") if "settings" in json.loads(file.read_text())]
    for number, file in enumerate(kept):
        content = json.loads(file.read_text())
        del content["settings"]["how"]["resolution"]
        file.unlink()
        older = file.with_name(f"{file.name.rpartition('-')[0]}-{number:012d}.json")
        older.write_text(json.dumps(content))
        if (pictures := file.with_suffix("")).exists():
            pictures.rename(older.with_suffix(""))
    sweep(evaluate=[EVALUATE[0] | {"guidance": [*EVALUATE[0]["guidance"], 2.0]}])
    assert len(kept) == 2 and measured == [(EVALUATE[0]["split"], adapted) for adapted in (True, False)]


def test_measurements_are_not_repeated_when_options_are_added(sweep, measured, newer_version):
    sweep(evaluate=REWARDED)
    measured.clear()
    for kind, name in PARTS:
        newer_version(kind, name, newer=0.0)
    more = [REWARDED[0] | {"guidance": [1.0, 2.0]}, REWARDED[1]]
    board, ran = sweep(evaluate=more)
    assert [state.error for state in board.states.values()] == [None]
    assert ran == ["mine-seed0"]
    assert measured == [("validation", True), ("validation", False)]
    measured.clear()
    newer_version("rewards", "shapes", newer=0.0, verdict="graded")
    assert sweep(evaluate=more)[1] == ["mine-seed0"]
    assert measured == [("validation", True), ("validation", True), ("validation", False), ("validation", False)]


@pytest.mark.parametrize("made_by", ["this version", "the first version"])
def test_training_is_not_repeated_when_options_and_evaluations_are_added(sweep, newer_version, made_by):
    sweep(evaluate=EVALUATE[:1])
    if made_by != "this version":
        as_the_first_version_left_it()
    for file in (CELL / "checkpoints").iterdir():
        file.unlink()
    newer_version("objectives", "score_matching", newer=0.0)
    board, ran = sweep(evaluate=EVALUATE)
    assert (ran, board.count("done")) == (["mine-seed0"], 1)
    assert not any((CELL / "checkpoints").iterdir())
    assert sweep(evaluate=EVALUATE)[1] == []


def test_a_cell_of_the_first_version_with_other_settings_is_not_done(sweep):
    sweep(evaluate=EVALUATE[:1])
    as_the_first_version_left_it()
    content = json.loads((CELL / "cell.json").read_text())
    (CELL / "cell.json").write_text(json.dumps(content | {"fingerprint": "0" * 64}))
    assert sweep(evaluate=EVALUATE[:1])[1] == ["mine-seed0"]


def test_a_damaged_job_of_the_first_version_is_skipped(sweep):
    sweep(evaluate=EVALUATE[:1])
    as_the_first_version_left_it()
    Path("runs/mine/jobs/mine-seed0.yaml").write_text("recipe: [")
    assert sweep(evaluate=EVALUATE[:1])[1] == []  # recipe.yaml and sweep.json say enough


def test_a_damaged_cell_file_is_named_and_the_cell_is_finished_again(sweep, caplog):
    sweep(evaluate=EVALUATE[:1])
    (CELL / "cell.json").write_text('{"settings": ')
    assert sweep(evaluate=EVALUATE[:1])[1] == ["mine-seed0"]
    assert "cell.json: is damaged" in caplog.text
