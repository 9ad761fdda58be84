"""A kept measurement counts for the prompt that it was made for, and is made again when that has changed since."""

import json
import os

import pytest
from PIL import Image
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.evaluate_target import EvalOptions, evaluate_target
from agsm_rl.evaluate.image_folder import ASKED, Measurements
from agsm_rl.evaluate.suite import Suite
from agsm_rl.evaluate.suites.rewards import RewardsResult

FIRST, SECOND = {"prompt": "a dog", "colour": "red"}, {"prompt": "a cat", "colour": "blue"}


class Letters(Suite):
    """How long a prompt is with its colour, and a record of what was judged."""

    name, num_images = "letters", 2

    def __init__(self):
        self.judged, self.fails_after = [], None

    def prompts(self):
        return {0: FIRST, 1: SECOND}

    def judge(self, images, prompts, metadata):
        if self.fails_after is not None and len(self.judged) >= self.fails_after:
            raise UserError("the judge is gone")
        self.judged += [row["prompt"] for row in metadata]
        return [len(row["prompt"] + row.get("colour", "")) for row in metadata]

    def result(self, judged):
        lengths = {item.prompt_index: [float(item.row)] for item in judged}
        return RewardsResult({"length": lengths}, dict.fromkeys(lengths, ""), {"length": 1.0})


@pytest.fixture
def folder(tmp_path):
    """Two images of any tool."""
    for index, row in enumerate((FIRST, SECOND)):
        samples = tmp_path / f"im/{index:05d}/samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(row))
        Image.new("RGB", (4, 4), "red").save(samples / "0000.png")
    return tmp_path / "im"


def change(folder, index, row):
    (folder / f"{index:05d}/metadata.jsonl").write_text(json.dumps(row))


def judged(folder, suite=None):
    """What an evaluation judges, and the figure that it gives."""
    suite = suite or Letters()
    content = evaluate_target(str(folder), suite, EvalOptions())
    return suite.judged, content["overall"]


def make_earlier(folder):
    """Leave the rows as versions did that did not store the prompt; they are newer than the prompts."""
    for file in folder.glob("*/letters/*.json"):
        content = json.loads(file.read_text())
        del content[ASKED]
        file.write_text(json.dumps(content))
    set_age(folder, "letters/0000.png.json", 1_000)
    set_age(folder, "metadata.jsonl", 2_000)


def set_age(folder, name, seconds):
    for place in folder.iterdir():
        os.utime(place / name, (2e9 - seconds, 2e9 - seconds))


@pytest.mark.parametrize("changed", [SECOND | {"prompt": "a kitten"}, SECOND | {"colour": "yellow"}])
def test_a_prompt_or_a_column_that_was_corrected_is_measured_again_and_no_other(folder, changed):
    assert judged(folder) == (["a dog", "a cat"], (8 + 9) / 2)
    assert judged(folder) == ([], (8 + 9) / 2)
    change(folder, 1, changed)
    assert judged(folder) == ([changed["prompt"]], (8 + len(changed["prompt"] + changed["colour"])) / 2)


def test_a_corrected_prompt_is_scored_anew_by_the_command(folder, tmp_path):
    change(folder, 0, {"prompt": "a red star"})
    change(folder, 1, {"prompt": "a red star"})
    how = ["eval", str(folder), "--suite", "shapes", "--json", str(tmp_path / "e.json")]
    assert CliRunner().invoke(app, how).exit_code == 0
    change(folder, 1, {"prompt": "two blue circles"})
    assert CliRunner().invoke(app, how).exit_code == 0
    rows = json.loads((tmp_path / "e.json").read_text())["images"]
    assert [row["prompt"] for row in rows] == ["a red star", "two blue circles"]


def test_the_order_of_the_columns_is_no_change(folder):
    judged(folder)
    change(folder, 1, dict(reversed(SECOND.items())))
    assert judged(folder)[0] == []


def test_a_measurement_that_was_interrupted_goes_on_where_it_was(folder, monkeypatch):
    monkeypatch.setattr("agsm_rl.evaluate.suite_process.JUDGED_AT_ONCE", 1)
    suite = Letters()
    suite.fails_after = 1
    with pytest.raises(UserError, match="the judge is gone"):
        evaluate_target(str(folder), suite, EvalOptions())
    assert judged(folder)[0] == ["a cat"]


def test_a_row_of_an_earlier_version_counts_until_the_prompt_beside_it_is_written_anew(folder):
    judged(folder)
    make_earlier(folder)
    assert judged(folder)[0] == []
    change(folder, 1, SECOND | {"prompt": "a kitten"})
    os.utime(folder / "00001/metadata.jsonl", (2e9, 2e9))
    assert judged(folder) == (["a kitten"], (8 + 12) / 2)
    assert judged(folder)[0] == []


def test_a_row_of_an_earlier_version_that_names_its_prompt_counts_for_that_one_alone(folder):
    image, kept = folder / "00000/samples/0000.png", Measurements("verdicts", {"judge": "shapes"})
    kept.write(image, {"prompt": "a dog", "correct": True})
    os.utime(kept.file(image), (0, 0))
    assert kept.read(image, FIRST) == {"prompt": "a dog", "correct": True}
    assert kept.read(image, SECOND) is None


def test_a_judge_that_sees_no_prompt_measures_once_whatever_the_prompt(folder):
    class Blind(Letters):
        needs_prompts = False

    assert judged(folder, Blind())[0] == ["a dog", "a cat"]
    change(folder, 1, SECOND | {"prompt": "a kitten"})
    assert judged(folder, Blind())[0] == []


def test_a_column_that_the_images_metadata_lacks_is_no_change(folder):
    kept, image = Measurements("letters", {}), folder / "00000/samples/0000.png"
    kept.write(image, 5, FIRST | {"note": "of a later list of prompts"})
    assert kept.read(image, FIRST) == kept.read(image, FIRST | {"note": "another"}) == 5
    assert kept.read(image, FIRST | {"colour": "blue"}) is None
