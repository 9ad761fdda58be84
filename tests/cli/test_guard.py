"""What an error becomes at the top: one message and exit code 2 for what a user can change, a traceback for a bug."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from agsm_rl.cli import results
from agsm_rl.cli.commands import COMMANDS, app
from agsm_rl.cli.guard import BUG, TRACEBACK, GuardedCommands
from agsm_rl.errors import UserError


def outcome(raising):
    """What a program's command `eval` ends with."""
    program = typer.Typer(cls=GuardedCommands)
    program.command("eval")(raising)
    program.command("train")(lambda: None)
    return CliRunner().invoke(program, ["eval"])


def raised(error):
    def raising():
        raise error

    return raising


def decoded():
    b"\xff".decode("utf-8")


def nested():
    json.loads("[" * 100_000)


def allocated():
    torch.empty(2**60, dtype=torch.uint8)


OUTSIDE = {
    "a mistake of the user's": (raised(UserError("x: wrong")), "x: wrong"),
    "a file that is not there": (lambda: os.stat("/nowhere/x"), "/nowhere/x: cannot be read or written (No such file"),
    "a full disk": (raised(OSError(errno.ENOSPC, "No space left", "a/b")), "a/b: .*(No space left); free some space"),
    "a full disk without a name": (raised(OSError(errno.ENOSPC, "No space left")), "No space left"),
    "a library's own OSError": (raised(OSError("cannot load x\nbecause of y")), "cannot load x"),
    "a network": (raised(ConnectionResetError("reset")), "reset"),
    "no memory": (raised(MemoryError()), "the memory is not enough (MemoryError). Lower --batch-size"),
    "no memory, by torch": (allocated, "Lower --batch-size, --num-images or --resolution"),
    "no memory on a GPU": (raised(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")), "Tried 2 GiB.*Lower"),
    "bytes that are no text": (decoded, "cannot be read or written in its encoding"),
    "data nested too deeply": (nested, "nested too deeply"),
}


@pytest.mark.parametrize("cause", OUTSIDE)
def test_what_comes_from_outside_is_one_message_and_exit_code_2(cause):
    raising, words = OUTSIDE[cause]
    result = outcome(raising)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("agsm-rl: ")
    for part in words.split(".*"):
        assert part in line


def recursing():
    return recursing()


@pytest.mark.parametrize("raising", [raised(KeyError("x")), raised(RuntimeError("shapes differ")), recursing])
def test_a_bug_keeps_its_traceback_and_asks_to_be_reported(raising):
    result = outcome(raising)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and result.stderr.strip().endswith(BUG)


def test_the_traceback_of_a_message_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(TRACEBACK, "1")
    result = outcome(raised(UserError("x: wrong")))
    assert result.exit_code == 2 and "Traceback" in result.stderr and result.stderr.endswith("agsm-rl: x: wrong\n")


def test_an_interrupt_is_130():
    result = outcome(raised(KeyboardInterrupt()))
    assert (result.exit_code, result.stderr) == (130, "agsm-rl: interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "\x1b[31mx.yaml"],
        ["report", "\x1b[31mx"],
        ["\x1b[31m"],
        ["list", "\x1b[31mx"],
        ["sample", "a", "b", "--bank", "\x1b[31m"],
        ["--\x1b[31m"],
        ["eval", "x", "--suite", "\x9b31m"],
    ],
)
def test_no_control_character_of_the_command_line_reaches_the_terminal(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "\x1b[31m" not in result.output and "\x9b" not in result.output
    assert r"\x1b[31m" in result.output or r"\x9b31m" in result.output


def agsm_rl(*arguments, **options):
    environment = os.environ | options.pop("env", {})
    return subprocess.run([sys.executable, "-m", "agsm_rl", *arguments], env=environment, timeout=120, **options)


def test_a_full_disk_under_the_output_is_exit_code_2():
    with open("/dev/full", "w") as full:
        done = agsm_rl("list", "--json", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "agsm-rl: the output could not be written (No space left on device).\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_and_lists_are_printed_in_any_encoding(encoding):
    for arguments in (["eval", "--help"], ["list", "rollouts"]):
        done = agsm_rl(*arguments, env={"PYTHONIOENCODING": encoding}, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        assert len(done.stdout.decode(encoding)) > 500


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options(name):
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "Usage: " in result.stdout


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(results.os, "access", lambda folder, mode: False)
    for check, option in ((results.check_output_file, "--json"), (results.check_output_folder, "--images")):
        with pytest.raises(UserError, match=f"{option} .*: {tmp_path} is not writable"):
            check(tmp_path / "new", option=option)
    with pytest.raises(UserError, match="there is no folder"):
        results.check_output_file(tmp_path / "no" / "x.json", option="--json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; give a folder"):
        results.check_output_folder(tmp_path / "file" / "x", option="-o")
