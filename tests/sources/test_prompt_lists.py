"""Lists of prompts: one reader for what training, sampling and evaluation read."""

import csv
import json
import os

import datasets
import pytest

from agsm_rl.errors import UserError
from agsm_rl.sources.prompt_lists import LONGEST, read_prompts
from agsm_rl.sources.prompts import Prompts
from agsm_rl.sources.rollouts import Rollouts

ODD = ["a red star", "two dogs, one cat", "a \u2028 line \x0b that goes on \x85", "a “quoted” café"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, mark="", end="\n"):
    """ODD in the form that the name says, with a byte order mark and line ends."""
    if path.suffix == ".txt":
        text = end.join(["", *ODD, "", " "])
    elif path.suffix == ".jsonl":
        text = end.join(json.dumps({"n": 1, "prompt": prompt}, ensure_ascii=False) for prompt in ODD) + end + end
    elif path.suffix == ".json":
        text = json.dumps([{"prompt": prompt} for prompt in ODD])
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator=end)
            rows.writerows([["Prompt", "Category"], *([prompt, "x"] for prompt in ODD)])
        text = path.read_bytes().decode()
    path.write_bytes((mark + text).encode())
    return str(path)


def texts(path, **options):
    return [prompt.text for prompt in read_prompts(str(path), **options)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".JSONL"])
def test_prompts_are_the_same_in_every_form_of_file(tmp_path, suffix, mark, end):
    path = tmp_path / f"list{suffix.lower()}"
    write(path, mark, end)
    path = path.rename(tmp_path / f"list{suffix}")
    assert texts(path) == [prompt.strip() for prompt in ODD]


def test_training_reads_tables_as_evaluation_does(tmp_path):
    file = write(tmp_path / "geneval.jsonl")

    class Shard:
        index, count = 0, 1

    for source in (Prompts(file, 2), Rollouts(file, [(lambda images, prompts: images.mean((1, 2, 3)), 1.0)])):
        source.bind("mine", 0, Shard())
        assert source._prompts == texts(file)


def test_other_columns_are_kept_as_metadata(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tag": "counting", "prompt": "two stars", "include": [{"count": 2}]}')
    (prompt,) = read_prompts(str(tmp_path / "a.jsonl"))
    assert prompt.metadata == {"tag": "counting", "include": [{"count": 2}]}


def test_json_may_be_a_list_of_texts_or_columns(tmp_path):
    (tmp_path / "a.json").write_text('["one", "two"]')
    (tmp_path / "b.json").write_text('{"prompt": ["one", "two"], "n": [1, 2]}')
    (tmp_path / "c.jsonl").write_text('"one"\n"two"\n')
    for name in ("a.json", "b.json", "c.jsonl"):
        assert texts(tmp_path / name) == ["one", "two"]


def test_a_quoted_cell_may_hold_line_ends(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,n\n"two\nstars",1\n\n"say ""hi""",2\n')
    assert texts(tmp_path / "a.csv") == ["two\nstars", 'say "hi"']


def test_a_data_set_is_read_by_split_and_column_without_its_images(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "caption": ["a star", "stars"], "words": "x"}')
    assert texts(tmp_path) == ["a star"]
    assert texts(tmp_path, column="words") == ["x"]


def test_a_column_of_what_has_none_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a star\n")
    for prompts in (tmp_path / "a.txt", "builtin:shapes-prompts"):
        with pytest.raises(UserError, match="prompt_column 'words' has no effect: it is a list, without columns"):
            texts(prompts, column="words")
    with pytest.raises(UserError, match="it has no configuration"):
        texts("builtin:shapes-prompts", config="x")


REFUSED = {
    "no.txt": (None, "there is no such file or folder in .*; give a text file"),
    "a.jsonl": (b'{"words": "x", "id": 1}', "none of its columns \\(words, id\\) .*prompt_column"),
    "b.jsonl": (b'{"prompt": "x"}\n{"prompt": ', "line 2: it is not valid JSON"),
    "c.jsonl": (b'{"prompt": "x"}\n3\n', "line 2: it is 3, but a row is a JSON object"),
    "d.jsonl": (b'{"prompt": "x"}\n{"prompt": ""}', "line 2: 'prompt' is '', but a prompt is a text"),
    "e.jsonl": (b'{"prompt": "x"}\n{"other": "y"}', "line 2: 'prompt' is None"),
    "f.csv": (b"prompt,n\na red, round star,1\n", "line 2 has 3 cells, but the header names 2"),
    "g.csv": (b"prompt\n\xff\n", "line 2 is not valid utf-8"),
    "h.txt": (b'{"prompt": "x"}\n{"prompt": "y"}\n', "look like JSON, not prompts; rename it to .jsonl"),
    "i.txt": (b"\n \r\n", "it has no prompts"),
    "j.jsonl": (b"", "it has no prompts"),
    "k.csv": (b"prompt\n", "it has no prompts"),
    "l.yaml": (b"- a star\n", "a .yaml file is not a list of prompts"),
    "m.txt": (b"a" * (LONGEST + 1), "line 1: it has 20,001 characters, but a prompt has at most 20,000"),
    "n.txt": (b"a\0b", "cannot be read as text"),
    "o.parquet": (b"PAR1", "cannot be opened as parquet"),
    "p.json": (b"[" * 100_000, "nested too deeply|not valid JSON"),
    "q.csv": (b"prompt,prompt\na,b\n", "names the column 'prompt' twice"),
    "r.txt": ("ein schönes Bild\n".encode("utf-16"), "line 1 is not valid utf-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_a_list_of_prompts_is_refused_with_the_place(tmp_path, monkeypatch, name):
    content, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"prompts '{name}'.*({message})"):
        read_prompts(name)


def test_a_huge_cell_is_read_and_a_prompt_that_is_not_one_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt,notes\na star,{'x' * 300_000}\n")
    assert texts(tmp_path / "a.csv") == ["a star"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError):
        read_prompts(str(tmp_path / name))
