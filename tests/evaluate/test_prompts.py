"""Prompts from every form of file that the field's lists come in."""

import json

import datasets
import pytest

from agsm_rl.errors import UserError
from agsm_rl.evaluate.prompts import read_prompts

TEXTS = ["a red star", "two dogs, one cat", "‘quoted’ café"]


def write(path):
    if path.suffix == ".txt":
        path.write_text("\n".join(["", *TEXTS, ""]), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"n": 1, "prompt": text}) for text in TEXTS))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_dict({"caption": TEXTS}).to_parquet(path)
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        path.write_text(f"Prompt{comma}Category\n" + "".join(f'"{text}"{comma}x\n' for text in TEXTS), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_prompts_are_read_in_order_from(tmp_path, suffix):
    path = write(tmp_path / f"list{suffix}")
    assert [row["prompt"] for row in read_prompts(path).values()] == TEXTS
    assert list(read_prompts(path, limit=2)) == [0, 1]


def test_a_column_may_be_named_and_of_several_captions_the_first_is_taken(tmp_path):
    rows = {"caption": ["no", "no"], "captions": [["a dog", "a hound"], ["a cat"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "coco.parquet")
    found = read_prompts(str(tmp_path / "coco.parquet"), column="captions")
    assert [row["prompt"] for row in found.values()] == ["a dog", "a cat"]


def test_a_folder_that_datasets_knows_is_read_by_its_split(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    for split in ("train", "test"):
        (place / f"{split}.jsonl").write_text(json.dumps({"text": f"of {split}"}))
    assert read_prompts(str(place), split="test") == {0: {"prompt": "of test"}}
    with pytest.raises(UserError, match="--prompt-split: 'tests' is not a split.*Did you mean 'test'"):
        read_prompts(str(place), split="tests")


def test_the_shapes_world_s_held_out_prompts_are_built_in():
    assert len(read_prompts("builtin:shapes-prompts", limit=5)) == 5
    with pytest.raises(UserError, match="Did you mean 'builtin:shapes-prompts'"):
        read_prompts("builtin:shapes-prompt")


@pytest.mark.parametrize("name", ["no.txt", "no.csv", "./no", "no.parquet"])
def test_a_missing_file_is_told(name):
    with pytest.raises(UserError, match="there is no such file"):
        read_prompts(name)


def test_wrong_columns_and_empty_prompts_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"words": "x", "id": 1}\n')
    with pytest.raises(UserError, match="words, id.*--prompt-column"):
        read_prompts(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="Did you mean 'words'"):
        read_prompts(str(tmp_path / "a.jsonl"), column="word")
    with pytest.raises(UserError, match="row 0"):
        read_prompts(str(tmp_path / "a.jsonl"), column="id")
    (tmp_path / "b.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no prompts"):
        read_prompts(str(tmp_path / "b.txt"))
    (tmp_path / "d.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="d.txt': it cannot be read as text .line 1 is not valid utf-8"):
        read_prompts(str(tmp_path / "d.txt"))
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(UserError, match="line 1: it is not valid JSON"):
        read_prompts(str(tmp_path / "c.jsonl"))
