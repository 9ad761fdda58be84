"""The files that cells keep are validated when read; a damaged one counts as missing, and a warning names it."""

import json
import os

import pytest
import torch

from agsm_rl.evaluate.drawing import to_picture, write_picture
from agsm_rl.evaluate.kept_files import read_kept
from agsm_rl.evaluate.kept_measurements import Measurement, read_measurement
from agsm_rl.evaluate.measured import Measured, entries_of
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.sweep.kept import Result, Trained

TRAINED = {"settings": {}, "recipe": "0", "steps": 2, "images": 8, "seconds": 1.5}
FIGURES = {"split": "held_out", "guidance": 1.0, "num_images": 4, "strict": 0.5, "overall": 0.5}
RESULT = TRAINED | {"evaluations": [FIGURES], "base": [FIGURES]}
VERDICT = {"prompt": "a red star", "tag": "single", "correct": True, "strict": False, "reason": ""}
MEASUREMENT = {"suite": "shapes", "images": [VERDICT], "rewards": {"shapes": 0.5}}
SOUND = [(Trained, TRAINED), (Result, RESULT), (Measurement, MEASUREMENT)]

DAMAGED = {
    "empty": b"",
    "half": b'{"steps": 2',
    "a list": b"[1]",
    "a number": b"7",
    "null": b"null",
    "not UTF-8": b'{"recipe": "\xff"}',
    "deep": b"[" * 100_000,
    "a number without end": b'{"steps": ' + b"1" * 5000 + b"}",
    "NaN": b'{"seconds": NaN, "steps": NaN, "rewards": {"a": NaN}}',
}


@pytest.mark.parametrize(("shape", "content"), SOUND)
def test_an_intact_file_is_read_as_it_was_written(tmp_path, shape, content):
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_kept(tmp_path / "x.json", shape) == content


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("shape", [Trained, Result, Measurement])
def test_a_damaged_file_counts_as_missing_and_is_named(tmp_path, caplog, shape, damage):
    (tmp_path / "x.json").write_bytes(DAMAGED[damage])
    assert read_kept(tmp_path / "x.json", shape) == {}
    assert "x.json: is damaged" in caplog.text


@pytest.mark.parametrize(("shape", "content"), SOUND)
def test_one_value_of_the_wrong_type_counts_as_damage(tmp_path, caplog, shape, content):
    for key in content:
        wrong = {
            "settings": 5,
            "recipe": [],
            "steps": "two",
            "images": "8",
            "seconds": "long",
            "suite": 1,
            "rewards": [],
        }
        caplog.clear()
        (tmp_path / "x.json").write_text(json.dumps(content | {key: wrong.get(key, [{}])}))
        assert read_kept(tmp_path / "x.json", shape) == {}, key
        assert key in caplog.text


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path, caplog):
    os.mkfifo(tmp_path / "x.json")
    assert read_kept(tmp_path / "x.json", Trained) == {}
    assert "not a regular file" in caplog.text


def test_a_missing_file_gives_no_warning(tmp_path, caplog):
    assert read_kept(tmp_path / "x.json", Trained) == {} and not caplog.text


def test_a_measurement_without_its_images_is_repeated(tmp_path, caplog):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(MEASUREMENT))
    (entry,) = entries_of(Evaluate(), Parts(where="recipe"))
    assert read_measurement(file, entry, 1.0) is None
    pictures = tmp_path / "x"
    pictures.mkdir()
    (pictures / "0000.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    assert read_measurement(file, entry, 1.0) is None
    assert caplog.text.count("x.json: is damaged") == 2
    write_picture(to_picture(torch.zeros(3, 8, 8)), pictures / "0000.png")
    assert isinstance(read_measurement(file, entry, 1.0), Measured)
