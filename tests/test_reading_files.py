"""Files are replaced whole, and anything that is not a file of the expected kind is refused by its name."""

import errno
import json
import os
import socket

import pytest
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.files import MAX_DEPTH, check_regular, read_json, read_text, replacing, write_text


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def device(path):
    path.symlink_to("/dev/zero")


def listener(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


@pytest.mark.parametrize("make", [pipe, folder, device, listener])
def test_only_regular_files_are_read(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.json"
    make(path.relative_to(tmp_path) if make is listener else path)
    for read in (check_regular, read_text, read_json):
        with pytest.raises(UserError, match=r"x.json: this is (not a regular file|a folder)"):
            read(path)


def test_a_file_that_is_not_there_or_has_an_impossible_name_is_reported(tmp_path):
    for name, words in (("none", "No such file"), ("a\0b", "null"), ("x" * 300, "too long")):
        with pytest.raises(UserError, match=words):
            read_text(tmp_path / name)


BROKEN = {
    "is not text in UTF-8": b"\xff\xfe{}",
    "is not JSON": b"{",
    "is not JSON .*line 1": b"",
    "is not JSON .*digits": b"[" + b"9" * 5000 + b"]",
    "nested too deeply": b"[" * 100_000,
    "nested too deeply .more than 100": b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2),
}


@pytest.mark.parametrize("words", BROKEN)
def test_what_is_not_json_is_named_with_its_fault(words, tmp_path):
    (tmp_path / "x.json").write_bytes(BROKEN[words])
    with pytest.raises(UserError, match=f"x.json: {words}" if "nested" not in words else words):
        read_json(tmp_path / "x.json")


def test_a_file_beyond_the_bound_is_refused_without_reading_on(tmp_path):
    (tmp_path / "x").write_text("12345")
    assert read_text(tmp_path / "x", max_bytes=5) == "12345"
    with pytest.raises(UserError, match="more than 4 bytes"):
        read_text(tmp_path / "x", max_bytes=4)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(tmp_path / "x") == {"a": 1}


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path):
    file = tmp_path / "x"
    write_text(file, "old")
    with pytest.raises(OSError, match="x'") as failed, replacing(file) as aside:
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failed.value.filename == str(file)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(NotADirectoryError) as failed:
        write_text(file / "y", "new")
    assert failed.value.filename == str(file / "y")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "PIPE"],
        ["check", "PIPE"],
        ["sweep", "PIPE"],
        ["report", "PIPE"],
        ["eval", "PIPE", "--suite", "geneval"],
        ["eval", "x", "--suite", "rewards", "--rewards", "PIPE", "--prompts", "builtin:shapes-prompts"],
        ["eval", "x", "--suite", "rewards", "--reward", "sharpness", "--prompts", "PIPE"],
    ],
)
def test_no_command_waits_for_a_named_pipe(arguments, tmp_path):
    pipe(path := tmp_path / "x.jsonl")
    result = CliRunner().invoke(app, [str(path) if part == "PIPE" else part for part in arguments])
    assert result.exit_code == 2 and str(path) in result.stderr, result.output
