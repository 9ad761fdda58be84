"""Strangers' data: what cannot be used is refused and leaves no run folder; single bad rows are counted and shown."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import pytest
from bad_input import assert_refused, picture


def image_folder(folder: Path, rows: dict[str, tuple[bytes, Any]]) -> str:
    """Files with captions: name → content, caption."""
    folder.mkdir()
    for name, (data, _) in rows.items():
        (folder / name).write_bytes(data)
    lines = [json.dumps({"file_name": name, "caption": caption}) for name, (_, caption) in rows.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def good(count: int, caption: str = "picture") -> dict[str, tuple[bytes, Any]]:
    return {f"{index}.png": (picture(), f"{caption} {index}") for index in range(count)}


def parquet(folder: Path, **columns: list[Any]) -> str:
    folder.mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    return str(folder)


def huge_png(side: int = 20_000) -> bytes:
    """A PNG that says it is 20,000 x 20,000: 1.2 GB of pixels from a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def written(folder: Path, name: str, data: bytes) -> str:
    folder.mkdir()
    (folder / "0.png").write_bytes(picture())
    (folder / name).write_bytes(data)
    return str(folder)


# What makes the data set, in a folder that is not there yet → words of the message.
REFUSED = {
    "no caption column": (
        lambda at: parquet(at, image=[picture()] * 3, words=["a"] * 3),
        ["no caption column", "words"],
    ),
    "no image column": (lambda at: parquet(at, caption=["a"] * 3), ["no column 'image'", "caption", "image_column"]),
    "no rows": (lambda at: parquet(at, image=[], caption=[]), ["cannot be opened", "no data"]),
    "fewer rows than a batch": (lambda at: image_folder(at, good(1)), ["1 rows", "batch_size 2"]),
    "nothing but corrupt images": (
        lambda at: image_folder(at, {f"{i}.png": (b"no picture", f"a {i}") for i in range(9)}),
        ["consecutive rows cannot be read", "image cannot be read"],
    ),
    "nothing but images of 20,000 x 20,000": (
        lambda at: image_folder(at, {f"{i}.png": (huge_png(), f"a {i}") for i in range(9)}),
        ["cannot be read", "decompression bomb"],
    ),
    "captions that are all empty": (
        lambda at: image_folder(at, {f"{i}.png": (picture(), " ") for i in range(9)}),
        ["'caption'", "' '", "not empty"],
    ),
    "captions that are numbers": (
        lambda at: parquet(at, image=[picture()] * 9, caption=list(range(9))),
        ["'caption'", "a caption is a text"],
    ),
    "texts in place of images": (
        lambda at: parquet(at, image=["0.png"] * 9, caption=["a"] * 9),
        ["image cannot be read", "'0.png'"],
    ),
    "an empty folder": (lambda at: at.mkdir() or str(at), ["no images and no tables", "metadata.jsonl"]),
    "a folder without captions": (lambda at: written(at, "1.png", picture()), ["caption"]),
    "metadata that is no JSON": (
        lambda at: written(at, "metadata.jsonl", b'{"file_name": "0.png", '),
        ["metadata.jsonl: line 1", "not valid JSON"],
    ),
    "metadata in Latin-1": (
        lambda at: written(
            at, "metadata.jsonl", '{"file_name": "0.png", "caption": "ein schönes Bild"}'.encode("latin-1")
        ),
        ["metadata.jsonl", "line 1 is not valid utf-8"],
    ),
    "metadata of files that are not there": (
        lambda at: written(at, "metadata.jsonl", b'{"file_name": "gone.png", "caption": "a"}'),
        ["none of the 1 rows", "gone.png"],
    ),
    "a parquet file that is none": (lambda at: written(at, "rows.parquet", b"PAR1 no more"), ["cannot be opened"]),
    "a name that nobody knows": (
        lambda at: "nobody/nothing-of-this-name",
        ["nobody/nothing-of-this-name", "cannot be opened"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_data_set_that_cannot_be_used_is_refused(train, content, tmp_path, case):
    make, words = REFUSED[case]
    content["objectives"][0]["source"] = {"use": "pairs", "dataset": make(tmp_path / "data"), "batch_size": 2}
    assert_refused(train(content), "dataset", *words, folder=tmp_path / "run")


def preferences(at: Path, **columns: list[Any]) -> str:
    return parquet(at, jpg_0=[picture()] * 4, jpg_1=[picture()] * 4, **columns)


PREFERENCES = {
    "columns of another kind": (
        lambda at: parquet(at, image=[picture()] * 3, caption=["a"] * 3),
        ["it has: image, caption"],
    ),
    "nothing but ties": (
        lambda at: preferences(at, caption=list("abcd"), label_0=[0.5] * 4),
        ["0 rows that are not ties"],
    ),
    "labels that mean nothing": (
        lambda at: preferences(at, caption=list("abcd"), label_0=[7.0] * 4),
        ["row 0", "7.0", "0.5"],
    ),
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_preferences_that_cannot_be_used_are_refused(train, content, tmp_path, case):
    make, words = PREFERENCES[case]
    source = {"use": "preferences", "dataset": make(tmp_path / "data"), "batch_size": 2}
    content["objectives"] = [{"use": "diffusion_dpo", "source": source}]
    assert_refused(train(content), "dataset", *words, folder=tmp_path / "run")


PROMPTS = {
    "an empty file": (b"\n \n", ["no prompts"]),
    "Latin-1": ("ein schönes Bild\n".encode("latin-1"), ["cannot be read as text", "utf-8"]),
    "a binary file": (b"\x89PNG\xff\xfe\x00", ["cannot be read as text"]),
    "an empty folder": (None, ["no images and no tables"]),
    "not of the reward's world": (b"a photo of my cat\n", ["a photo of my cat"]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_cannot_be_used_are_refused(train, content, tmp_path, case):
    data, words = PROMPTS[case]
    if data is None:
        (tmp_path / "prompts.txt").mkdir()
    else:
        (tmp_path / "prompts.txt").write_bytes(data)
    own = {"use": "rollouts", "prompts": "prompts.txt", "rewards": {"shapes": 1.0}, "num_prompts": 1}
    own |= {"images_per_prompt": 2, "num_steps": 1, "guidance": 1.0}
    content["objectives"] = [{"use": "ddpo", "source": own}]
    assert_refused(train(content), *words, folder=tmp_path / "run")


def sound(*, bad: dict[str, tuple[bytes, Any]]) -> dict[str, tuple[bytes, Any]]:
    return good(3) | bad


# Rows among three sound ones → how many of the rows of an epoch are skipped.
USABLE = {
    "a corrupt image": (sound(bad={"bad.png": (picture()[:40], "a")}), 1),
    "an image of 20,000 x 20,000": (sound(bad={"bad.png": (huge_png(), "a")}), 1),
    "an empty file": (sound(bad={"bad.png": (b"", "a")}), 1),
    "an empty caption": (sound(bad={"bad.png": (picture(), "")}), 1),
    "no caption": (sound(bad={"bad.png": (picture(), None)}), 1),
    "a caption of 10,000 characters": (sound(bad={"long.png": (picture(), "a red star " * 910)}), 0),
    "a caption of other scripts": (sound(bad={"odd.png": (picture(), "赤い星 ⭐ \u202e\u0000")}), 0),
    "grey": (sound(bad={"grey.png": (picture("L"), "a")}), 0),
    "16 bits": (sound(bad={"deep.png": (picture("I;16"), "a")}), 0),
    "a palette": (sound(bad={"palette.png": (picture("P"), "a")}), 0),
    "transparent": (sound(bad={"clear.png": (picture("RGBA"), "a")}), 0),
    "CMYK": (sound(bad={"print.jpg": (picture("CMYK", form="JPEG"), "a")}), 0),
    "one pixel": (sound(bad={"dot.png": (picture(size=(1, 1)), "a")}), 0),
    "a line of pixels": (sound(bad={"line.png": (picture(size=(3000, 1)), "a")}), 0),
}


@pytest.mark.parametrize("case", USABLE)
def test_a_bad_row_among_good_ones_is_counted_and_shown_and_an_odd_one_is_used(train, content, tmp_path, caplog, case):
    rows, skipped = USABLE[case]
    dataset = image_folder(tmp_path / "data", rows)
    content["objectives"][0]["source"] = {"use": "pairs", "dataset": dataset, "batch_size": 4}
    result = train(content, "--set", "steps=1")
    assert result.exit_code == 0, result.output
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line.get("score_matching/rows_skipped", 0) == skipped
    assert caplog.text.count("skipped: ") == skipped


def test_a_class_of_one_image_is_used_as_any_other(train, content, tmp_path):
    """Folders a class, one of them with a single image; captions stand in the metadata."""
    for name, count in {"stars": 3, "circles": 1}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(count):
            (tmp_path / "data" / name / f"{index}.png").write_bytes(picture())
    files = sorted(path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*.png"))
    lines = [json.dumps({"file_name": str(file), "caption": f"{file.parent} {file.stem}"}) for file in files]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    content["objectives"][0]["source"] = {"use": "pairs", "dataset": str(tmp_path / "data"), "batch_size": 4}
    assert train(content, "--set", "steps=1").exit_code == 0
