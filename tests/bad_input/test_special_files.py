"""Named pipes, devices and folders where a file is expected: one message, exit code 2, and nothing hangs."""

import os
import signal

import pytest
from bad_input import assert_refused

COMMANDS = {
    "sample": ["sample", "{given}", "a red star"],
    "eval": ["eval", "{given}", "--num-images", 1],
    "eval --base": ["eval", "builtin:shapes-sd15", "--num-images", 1, "--base", "{given}"],
    "eval --against": ["eval", "builtin:shapes-sd15", "--num-images", 1, "--against", "{given}"],
    "convert": ["convert", "{given}", "out.safetensors"],
    "convert --to": ["convert", "{given}", "out", "--to", "agsm"],
    "report": ["report", "{given}"],
    "doctor": ["doctor", "{given}"],
    "train": ["train", "{given}"],
    "check": ["check", "{given}"],
    "sweep": ["sweep", "{given}"],
    "--rewards": ["eval", "builtin:shapes-sd15", "--suite", "rewards", "--prompts", "p.txt", "--rewards", "{given}"],
    "--prompts": [
        "eval",
        "builtin:shapes-sd15",
        "--suite",
        "rewards",
        "--reward",
        "brightness",
        "--prompts",
        "{given}",
    ],
    "--reference": ["eval", "builtin:shapes-sd15", "--suite", "fid", "--prompts", "p.txt", "--reference", "{given}"],
}
NAMES = ["pipe", "pipe.safetensors", "pipe.yaml", "pipe.jsonl", "soft_tokens.pth", "zero.safetensors", "/dev/zero"]


@pytest.fixture
def given(tmp_path):
    """Pipes, a device behind a file's name, empty folders; a test that waits for one of them fails."""
    for name in ("pipe", "pipe.safetensors", "pipe.yaml", "pipe.jsonl", "soft_tokens.pth"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "p.txt").write_text("a red star\n")

    def waited(*_):
        pytest.fail("the command hangs")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", COMMANDS)
def test_a_pipe_a_device_or_a_folder_for_a_file_is_one_message(command, given, case):
    for name in [*NAMES, "folder"]:
        result = command(*(word.format(given=name) if isinstance(word, str) else word for word in COMMANDS[case]))
        assert_refused(result, name)
