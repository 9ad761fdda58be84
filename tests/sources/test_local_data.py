"""Folders, files and archives of images: everything in them is read, and what is left out is reported."""

import csv
import json
import os
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import datasets
import pytest
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.sources import folder_files
from agsm_rl.sources.folder_files import list_files
from agsm_rl.sources.images import column_names, find_columns, open_dataset
from agsm_rl.sources.local_data import list_data
from agsm_rl.sources.pictures import read_picture


def png(color=(200, 30, 30)):
    file = BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def image_folder(folder, names, metadata="metadata.jsonl"):
    """Images captioned by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(png())
    if metadata == "metadata.jsonl":
        lines = [json.dumps({"file_name": name, "caption": name}) for name in names]
        (folder / metadata).write_text("\n".join(lines))
    elif metadata:
        with (folder / metadata).open("w", newline="") as file:
            csv.writer(file).writerows([["file_name", "caption"], *([name, name] for name in names)])


def parquet(file, text, count=3):
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": [png()] * count, "text": [text] * count}).to_parquet(file)


def opened(path, split="train", **options):
    options = {"num_rows": None, "streaming": False, "builtins": {}} | options
    return open_dataset(str(path), split=split, **options)


def captions(path, split="train", **options):
    found = opened(path, split, **options)
    image, caption = find_columns(column_names(found, str(path)), str(path), "image", None)
    rows = list(found)
    for row in rows:
        assert read_picture(row[image], "row").size == (8, 8)
    return [row[caption] for row in rows]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_and_class_folders_named_like_splits_hide_nothing(tmp_path, streaming, caplog):
    names = ["a cat.png", "a train.png", "test tubes.png", "val.png", "dev-1.png"]
    image_folder(tmp_path / "flat", names)
    assert captions(tmp_path / "flat", streaming=streaming) == names
    for name in ("cat", "dog", "train"):
        image_folder(tmp_path / "classes" / name, [f"{name} {number}.png" for number in range(2)])
    assert len(captions(tmp_path / "classes", streaming=streaming)) == 6
    assert not caplog.messages


def test_a_folder_that_consists_of_splits_is_read_by_them_and_says_so(tmp_path, caplog):
    for split, count in {"train": 3, "test": 2}.items():
        image_folder(tmp_path / "x" / split, [f"{split} {number}.png" for number in range(count)])
    assert captions(tmp_path / "x") == ["train 0.png", "train 1.png", "train 2.png"]
    assert captions(tmp_path / "x", "test") == ["test 0.png", "test 1.png"]
    assert "laid out as splits (train: 3 images, test: 2 images)" in caplog.messages[0]
    with pytest.raises(UserError, match="'validation' is not a split of it; allowed: test, train"):
        captions(tmp_path / "x", "validation")


def test_images_without_a_row_and_rows_without_an_image_are_counted_and_named(tmp_path, caplog):
    image_folder(tmp_path / "x", ["1.png", "2.png", "3.png"], "metadata.csv")
    (tmp_path / "x" / "1.png").unlink()
    (tmp_path / "x" / "extra.png").write_bytes(png())
    (tmp_path / "x" / "photo.heic").write_bytes(b"?")
    (tmp_path / "x" / "LICENSE").write_text("do as you like")
    assert captions(tmp_path / "x") == ["2.png", "3.png"]
    one_file, row, image = caplog.messages
    assert "not 1 other file (1 .heic): photo.heic" in one_file
    assert "left out 1 row of the metadata without an image: no 1.png" in row
    assert "left out 1 of 3 images without a row in the metadata: extra.png" in image


def test_captions_in_text_files_beside_the_images_are_read(tmp_path, caplog):
    image_folder(tmp_path / "x", ["1.png", "b.2.png", "3.png"], metadata=None)
    (tmp_path / "x" / "1.txt").write_text("\ufeffa red star\r\n", encoding="utf-8")
    (tmp_path / "x" / "b.2.caption").write_text("two stars\n")
    assert captions(tmp_path / "x") == ["a red star", "two stars"]
    assert "left out 1 of 3 images without a text file beside: 3.png" in caplog.text
    (tmp_path / "x" / "1.txt").write_text("a red star\na star in red\n")
    assert captions(tmp_path / "x") == [["a red star", "a star in red"], ["two stars"]]


def test_a_table_may_be_given_by_its_path(tmp_path):
    image_folder(tmp_path / "x", ["1.png", "2.png"], metadata=None)
    for name, text in {
        "list.csv": 'image,caption\n1.png,"one,\n two"\n2.png,b\n',
        "list.tsv": "file_name\tcaption\n1.png\tone,\\n two\n2.png\tb\n".replace("\\n", ""),
        "list.jsonl": '\ufeff{"file_name": "1.png", "caption": "one,\\n two"}\r\n\r\n{"file_name": "2.png", '
        '"caption": "b"}',
    }.items():
        (tmp_path / "x" / name).write_text(text, encoding="utf-8", newline="")
        first, second = captions(tmp_path / "x" / name)
        assert first.replace("\n", "") == "one, two" and second == "b"


def test_metadata_may_not_name_files_outside_its_folder(tmp_path):
    image_folder(tmp_path / "x", ["1.png"], metadata=None)
    (tmp_path / "secret.png").write_bytes(png())
    for name in ("../secret.png", str(tmp_path / "secret.png"), "file:///etc/passwd"):
        (tmp_path / "x" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "caption": "a"}))
        with pytest.raises(UserError, match="line 1: .*is not in the folder|row 0: .*is not in the folder"):
            captions(tmp_path / "x")


def test_parquet_files_are_read_by_split_whatever_lies_beside_them(tmp_path, caplog):
    folder = tmp_path / "p [1] *x"
    parquet(folder / "data" / "train-00000-of-00001.parquet", "of train")
    parquet(folder / "data" / "test-00000-of-00001.parquet", "of test", 2)
    (folder / "LICENSE").write_text("")
    (folder / "README.md").write_text("# no header")
    assert captions(folder) == ["of train"] * 3
    assert captions(folder, "test", streaming=True) == ["of test"] * 2
    assert captions(folder / "data" / "test-00000-of-00001.parquet") == ["of test"] * 2
    assert not caplog.messages
    parquet(folder / "notes.parquet", "of neither", 1)
    assert len(captions(folder)) == 6


def test_of_several_configurations_in_a_clone_one_must_be_named(tmp_path):
    for language in ("en", "de"):
        parquet(tmp_path / "hub" / language / "train-00000.parquet", language)
    readme = tmp_path / "hub" / "README.md"
    readme.write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.parquet\n"
        "- config_name: de\n  data_files:\n  - split: train\n    path: de/*.parquet\n---\n# A data set\n"
    )
    with pytest.raises(UserError, match="several configurations \\(en, de\\); say which one by `config:`"):
        captions(tmp_path / "hub")
    assert set(captions(tmp_path / "hub", config="de")) == {"de"}
    with pytest.raises(UserError, match="config: 'fr' is not a configuration of it; allowed: de, en"):
        captions(tmp_path / "hub", config="fr")
    readme.write_text(readme.read_text().replace("config_name: en", "config_name: en\n  default: true"))
    assert set(captions(tmp_path / "hub")) == {"en"}
    readme.write_text("---\nconfigs:\n- config_name: x\n  data_files: ../**\n---\n")
    with pytest.raises(UserError, match="outside the data set"):
        captions(tmp_path / "hub")


@pytest.mark.parametrize("key", ["config_name", "data_files", "data_dir"])
def test_a_readme_whose_aliases_stand_for_billions_of_texts_is_refused_at_once(tmp_path, key):
    image_folder(tmp_path, ["a.png"])
    lines = ["x0: &x0 [t, t, t, t, t, t, t, t, t, t]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10)]
    entry = {"config_name": "plain", "data_dir": "."} | {key: "*x9"}
    lines += ["configs:", "- " + "\n  ".join(f"{name}: {value}" for name, value in entry.items())]
    (tmp_path / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    with pytest.raises(UserError, match=f"`{key}` in its README.md is not a text"):
        list_data(tmp_path, config=None, where="data")


def test_what_save_to_disk_wrote_is_read(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [png()] * 2, "text": ["a", "b"]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert captions(tmp_path / "one") == captions(tmp_path / "one", streaming=True) == ["a", "b"]
    assert captions(tmp_path / "two", "test") == ["a"]


def test_archives_are_read_as_the_folders_that_they_hold(tmp_path):
    image_folder(tmp_path / "x", ["a train.png", "b.png"])
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        for file in (tmp_path / "x").iterdir():
            packed.write(file, f"sub/{file.name}")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "x", "sub")
    for name in ("x.zip", "x.tar.gz"):
        assert captions(tmp_path / name) == captions(tmp_path / name, streaming=True) == ["a train.png", "b.png"]
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4 no more")
    with pytest.raises(UserError, match="bad.zip cannot be read as an archive"):
        captions(tmp_path / "bad.zip")


def test_a_shard_of_webdataset_is_read(tmp_path):
    image_folder(tmp_path / "x", ["1.jpg", "2.jpg"], metadata=None)
    with tarfile.open(tmp_path / "shard-000.tar", "w") as packed:
        for number in (1, 2):
            (tmp_path / "x" / f"{number}.txt").write_text(f"picture {number}")
            for suffix in ("jpg", "txt"):
                packed.add(tmp_path / "x" / f"{number}.{suffix}", f"{number}.{suffix}")
    assert captions(tmp_path / "shard-000.tar") == ["picture 1", "picture 2"]
    assert captions(tmp_path / "shard-000.tar", streaming=True) == ["picture 1", "picture 2"]


def test_images_that_change_have_another_fingerprint(tmp_path):
    image_folder(tmp_path / "x", ["1.png"])
    before = opened(tmp_path / "x")._fingerprint
    assert opened(tmp_path / "x")._fingerprint == before
    (tmp_path / "x" / "1.png").write_bytes(png((1, 2, 3)) + b"\0")
    assert opened(tmp_path / "x")._fingerprint != before


def test_a_linked_folder_is_followed_and_a_circle_ends(tmp_path):
    image_folder(tmp_path / "elsewhere", ["1.png"])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "x")
    assert captions(tmp_path / "x") == ["1.png"]


def captioned(folder, names):
    """Images with a text file beside each."""
    image_folder(folder, names, metadata=None)
    for name in names:
        (folder / name).with_suffix(".txt").write_text(name)


def test_links_are_followed_to_files_and_folders_and_reported_once(tmp_path, caplog):
    captioned(tmp_path / "pool", ["a.png", "b.png"])
    captioned(tmp_path / "data", ["c.png"])
    captioned(tmp_path / "data" / "more", ["d.png"])
    for name in ("a.png", "a.txt"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "pool" / name)
    (tmp_path / "data" / "e.png").symlink_to("more/d.png")
    (tmp_path / "data" / "e.txt").symlink_to("more/d.txt")
    assert captions(tmp_path / "data") == ["a.png", "c.png", "d.png", "d.png"]
    (message,) = [record.message for record in caplog.records]
    assert "2 files of it are read through links to other folders: a.png, a.txt" in message


def test_a_folder_is_read_once_however_many_links_lead_to_it(tmp_path, caplog):
    captioned(tmp_path / "data" / "z", ["a.png"])
    (tmp_path / "data" / "a").symlink_to("z")
    (tmp_path / "data" / "z" / "up").symlink_to("..")
    assert captions(tmp_path / "data") == ["a.png"]
    assert "left out 2 links to folders that are read already: up, a" in caplog.text


@pytest.mark.parametrize("name", ["pipe.png", "pipe.txt", "metadata.jsonl", "pipe.parquet", "gone.png", "self.png"])
def test_pipes_devices_and_links_to_nothing_are_left_out_and_reported(tmp_path, caplog, name):
    captioned(tmp_path / "data", ["a.png"])
    odd = tmp_path / "data" / name
    if name == "gone.png":
        odd.symlink_to("nothing")
    elif name == "self.png":
        odd.symlink_to(name)
    else:
        os.mkfifo(odd)
        (tmp_path / "data" / "null.png").symlink_to("/dev/zero")
    assert captions(tmp_path / "data") == ["a.png"]
    assert "that are not files (named pipes, devices, links to nothing)" in caplog.text and name in caplog.text


def test_of_two_text_files_beside_an_image_the_txt_is_used_and_that_is_said_where_they_differ(tmp_path, caplog):
    captioned(tmp_path / "data", ["a.png", "b.png", "c.png"])
    (tmp_path / "data" / "a.caption").write_text("another")
    (tmp_path / "data" / "b.caption").write_text("b.png\n")
    (tmp_path / "data" / "c.txt").rename(tmp_path / "data" / "c.caption")
    assert captions(tmp_path / "data") == ["a.png", "b.png", "c.png"]
    (message,) = [record.message for record in caplog.records]
    assert "1 of 3 images have both a .txt and a .caption with different text; the .txt is used: a.png" in message


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_a_csv_with_another_separator_is_refused_by_its_name(tmp_path, separator, name):
    image_folder(tmp_path / "data", ["a.png"], metadata=None)
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name{separator}caption\na.png{separator}a star, red\n")
    with pytest.raises(UserError, match=f"its columns are separated by {name}.*a .csv is read with commas"):
        opened(tmp_path / "data")


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="/proc is Linux's")
@pytest.mark.parametrize("folder", ["/proc", "/proc/self", "/", "/sys"])
def test_a_part_of_the_system_is_refused_without_being_walked(folder, monkeypatch):
    monkeypatch.setattr(os, "walk", lambda *_, **__: pytest.fail("it is walked"))
    with pytest.raises(UserError, match="part of the system"):
        list_files(Path(folder), "dataset")


def test_a_folder_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_files, "MAX_FILES", 2)
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="more than 2 files"):
        list_files(tmp_path, "dataset")
